"""A connection that is cut in the middle of a transaction: what may be repeated is stored once, and answered so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, func, select

from gateway.errors import StoreUnavailable
from gateway.store import Store, schema
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission, claim_futures, insert_submissions
from gateway.store.records import Future, FutureStatus, Outcome, Run, Usage
from gateway.store.settling import settle_again
from tests.store.conftest import a_run, a_session, an_operation
from tests.store.test_commits import cut_connections
from tests.store.test_futures import a_checkpoint

Work = Callable[[Connection], Any]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.database._AGAIN_S", (0.0, 0.0, 0.0))


class Wire:
    """The way to the database, which is cut `cuts` times: after the commit if `committed`, else before it."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = store.database._driver.write
        self.cuts = 0
        self.committed = True
        self.groups = 0
        monkeypatch.setattr(store.database._driver, "write", self.write)

    def cut(self, times: int, *, committed: bool) -> None:
        self.cuts, self.committed, self.groups = times, committed, 0

    async def write(self, work: Work, **how: Any) -> Any:
        self.groups += 1
        if not self.cuts:
            return await self._write(work, **how)
        self.cuts -= 1
        if self.committed:
            await self._write(work, **how)
        raise ConnectionResetError("cut")


@pytest.fixture
def wire(store: Store, monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(store, monkeypatch)


async def begun(store: Store) -> Run:
    run = a_run(await store.sessions.create(a_session()))
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"", run))
    await store.futures.settle(Outcome(create, result=b""))
    return run


async def claimed(store: Store, run: Run, seq_id: int, kind: str = "forward_backward") -> Future:
    future = an_operation(run, seq_id, kind)
    await store.futures.submit(Submission(future, b"input"))
    await store.futures.claim(Claim((future.request_id,), 3))
    return replace(future, epoch=3)


async def count(store: Store, column: Any) -> int:
    [row] = await store.database.rows(select(func.sum(column)))
    return int(row[0] or 0)


@pytest.mark.parametrize("committed", [True, False])
async def test_an_outcome_is_stored_once_and_answered_as_stored(
    store: Store, wire: Wire, committed: bool
) -> None:
    run = await begun(store)
    future = await claimed(store, run, 1)
    used = Usage("alice", run.session_id, "m", training_tokens=7)
    heard: list[object] = []
    wire.cut(2, committed=committed)
    settled = await store.futures.settle(
        Outcome(future, result=b"r", summary={"loss": 2.5, "tokens": 7}, usage=used), heard.append
    )
    assert settled is not None and settled.result == b"r" and settled.future.status is FutureStatus.DONE
    assert heard == [settled]
    assert wire.groups == 3
    stored = await store.runs.get(run.run_id)
    assert stored is not None and (stored.next_seq, stored.pending_loss, stored.pending_tokens) == (2, 2.5, 7)
    assert await count(store, schema.usage.c.training_tokens) == 7
    assert await store.futures.result(future.request_id) == b"r"


async def test_a_step_is_recorded_once(store: Store, wire: Wire) -> None:
    run = await begun(store)
    future = await claimed(store, run, 1, "optim_step")
    wire.cut(1, committed=True)
    assert await store.futures.settle(Outcome(future, result=b"r")) is not None
    stored = await store.runs.get(run.run_id)
    assert stored is not None and stored.step == 1


async def test_a_save_is_registered_once(store: Store, wire: Wire) -> None:
    run = await begun(store)
    future = await claimed(store, run, 1, "save_weights")
    checkpoint = a_checkpoint(run, "n", "checkpoints/x")
    wire.cut(1, committed=True)
    settled = await store.futures.settle(Outcome(future, result=b"r", checkpoint=checkpoint))
    assert settled is not None and settled.future.error is None and settled.orphaned_folder is None
    assert await store.checkpoints.count("alice") == 1


@pytest.mark.parametrize("committed", [True, False])
async def test_failures_too(store: Store, wire: Wire, committed: bool) -> None:
    future = await claimed(store, await begun(store), 1)
    wire.cut(1, committed=committed)
    settled = await store.futures.settle(Outcome(future, error="wrong", error_category="user"))
    assert settled is not None and settled.future.error == "wrong"


async def test_what_another_has_settled_meanwhile_is_not_taken_for_ours(store: Store, wire: Wire) -> None:
    sample = Future("x:1", "alice", "e", "sample", 1, 1.0, sampler_id="x")
    await store.futures.submit(Submission(sample, b"prompt"))
    await store.futures.claim(Claim((sample.request_id,), 3))
    await store.futures.give_up(sample.request_id, "nobody wants it")
    wire.cut(1, committed=False)
    assert await store.futures.settle(Outcome(replace(sample, epoch=3), result=b"r")) is None


async def test_what_another_engine_has_settled_in_the_same_epoch_is_not_taken_for_ours(store: Store) -> None:
    sample = Future("x:1", "alice", "f", "sample", 1, 1.0, sampler_id="x")
    await store.futures.submit(Submission(sample, b"prompt"))
    await store.futures.claim(Claim((sample.request_id,), 3))
    theirs = replace(sample, epoch=3)
    assert await store.futures.settle(Outcome(theirs, result=b"r")) is not None
    ours = Outcome(replace(theirs, engine="e"), result=b"r")
    assert await store.database.write(settle_again, ours) is None
    assert await store.database.write(settle_again, Outcome(theirs, result=b"r")) is not None


async def test_a_claim_is_made_once_and_gives_the_inputs(store: Store, wire: Wire) -> None:
    run = await begun(store)
    future = an_operation(run, 1)
    await store.futures.submit(Submission(future, b"input"))
    wire.cut(1, committed=True)
    assert await store.futures.claim(Claim((future.request_id,), 3)) == {future.request_id: b"input"}
    stored = await store.futures.get(future.request_id)
    assert stored is not None and (stored.attempts, stored.epoch) == (1, 3)


async def test_what_may_not_be_repeated_is_refused_beside_it(store: Store, wire: Wire) -> None:
    run = await begun(store)
    first, second = await claimed(store, run, 1), an_operation(run, 2)
    await store.futures.submit(Submission(second, b"input"))
    wire.cut(1, committed=False)
    settling = store.futures.settle(Outcome(first, result=b"r"))
    submitting = store.database.write(insert_submissions, Submission(an_operation(run, 3), b"input"))
    claim_of_next = Claim((second.request_id,), 3)
    claiming = store.database.write(claim_futures, claim_of_next, again=claim_futures)
    settled, refused, claim = await asyncio.gather(settling, submitting, claiming, return_exceptions=True)
    assert settled is not None and not isinstance(settled, BaseException)
    assert isinstance(refused, StoreUnavailable)
    assert claim == {
        second.request_id: b"input"
    }  # which the schema allows when the first one is settled only
    assert await store.futures.get(f"{run.run_id}:3") is None


async def test_it_ends_when_the_server_stays_away(store: Store, wire: Wire) -> None:
    future = await claimed(store, await begun(store), 1)
    wire.cut(100, committed=False)
    with pytest.raises(StoreUnavailable):
        await store.futures.settle(Outcome(future, result=b"r"))
    assert wire.groups == 4
    wire.cut(0, committed=False)
    assert await store.futures.settle(Outcome(future, result=b"r")) is not None


async def test_a_read_is_repeated_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await begun(store)
    read = store.database._driver.read
    failures = [ConnectionResetError("cut")]

    async def once_cut(work: Work) -> Any:
        if failures:
            raise failures.pop()
        return await read(work)

    monkeypatch.setattr(store.database._driver, "read", once_cut)
    assert await store.runs.get(run.run_id) is not None
    failures += [ConnectionResetError("cut")] * 2
    with pytest.raises(StoreUnavailable):
        await store.runs.get(run.run_id)


@pytest.mark.postgres
async def test_a_real_connection_that_the_server_ends(pg_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.drivers._PING_AFTER_S", 60.0)
    store = Store(Database(pg_url))
    store.start()
    future = await claimed(store, await begun(store), 1)
    await cut_connections(pg_url)
    assert await store.futures.settle(Outcome(future, result=b"r")) is not None
    await store.close()
