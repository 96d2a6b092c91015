"""Waiting costs nothing: clients that wait read no database, and those that have left are forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.futures import Futures
from gateway.migrate import upgrade
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission
from gateway.store.records import Future, FutureStatus, Outcome, Settled
from tests.store.conftest import a_run, a_session, an_operation

WAITERS = 2000


class CountedStore:
    """Counts the transactions that only read."""

    def __init__(self, database: Database) -> None:
        self.reads = 0
        self._read = database.read
        database.read = self.read  # type: ignore[method-assign]

    async def read(self, work):  # type: ignore[no-untyped-def]
        self.reads += 1
        return await self._read(work)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    yield store
    await store.close()


async def accepted(store: Store, many: int) -> tuple[Futures, list[Future]]:
    """Open futures of one run, as this process has accepted them."""
    session = await store.sessions.create(a_session())
    run = a_run(session)
    futures = Futures(store, lambda future, body: None, 1 << 20)
    create = an_operation(run, 0, "create_run")
    await futures.submit(Submission(create, b"", run))
    operations = [an_operation(run, number + 1) for number in range(many)]
    await asyncio.gather(*(futures.submit(Submission(each, b"")) for each in operations))
    return futures, operations


async def test_many_who_wait_read_once_each_when_their_time_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.futures._ATTENTIVE_S", 0.2)
    futures, operations = await accepted(store, WAITERS)
    counted = CountedStore(store.database)
    asked = 0

    async def still_there() -> bool:
        nonlocal asked
        asked += 1
        return False

    waits = [
        asyncio.create_task(futures.outcome(each.request_id, "alice", 6.0, still_there))
        for each in operations
    ]
    for _ in range(40):
        await asyncio.sleep(0.1)
        if asked >= WAITERS:
            break
    assert counted.reads == 0
    assert asked >= WAITERS  # each was looked after meanwhile
    assert await asyncio.gather(*waits) == [None] * WAITERS
    assert counted.reads == WAITERS  # the last look: the answer of a commit may have been lost


async def test_who_has_left_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.futures._ATTENTIVE_S", 0.05)
    futures, [operation] = await accepted(store, 1)
    counted = CountedStore(store.database)

    async def left() -> bool:
        return True

    began = time.monotonic()
    assert await futures.outcome(operation.request_id, "alice", 30.0, left) is None
    assert time.monotonic() - began < 5
    assert counted.reads == 0


async def test_an_outcome_whose_news_was_lost_is_found_at_the_end(store: Store) -> None:
    futures, [operation] = await accepted(store, 1)
    for request_id in (f"{operation.run_id}:0", operation.request_id):
        await store.futures.claim(Claim((request_id,), 1))
        stored = await store.futures.get(request_id)
        assert stored is not None
        await store.futures.settle(Outcome(stored, result=b"r"))  # nobody tells `futures`
    settled = await futures.outcome(operation.request_id, "alice", 0.3)
    assert settled is not None
    assert settled.result == b"r"


@pytest.mark.parametrize("settled_meanwhile", [False, True])
async def test_a_repetition_whose_first_try_got_no_answer_is_dispatched_unless_it_has_its_outcome(
    store: Store, monkeypatch: pytest.MonkeyPatch, settled_meanwhile: bool
) -> None:
    _, [operation] = await accepted(store, 1)
    dispatched: list[str] = []
    futures = Futures(store, lambda future, body: dispatched.append(future.request_id), 1 << 20)
    get = store.futures.get

    async def outrun(request_id: str) -> Future | None:
        row = await get(request_id)
        if settled_meanwhile:  # between the database's answer and whoever waits for it
            assert row is not None
            futures.settled(Settled(replace(row, status=FutureStatus.DONE), b"r"))
        return row

    monkeypatch.setattr(store.futures, "get", outrun)
    await futures.submit(Submission(operation, b""))
    assert dispatched == ([] if settled_meanwhile else [operation.request_id])
    assert futures.awaits([operation.request_id]) is not settled_meanwhile
