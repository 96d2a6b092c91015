"""Accepting and settling in one statement: as the several statements do it, whole or not at all, in one round trip."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from benchmarks.filling import fill
from benchmarks.plans import listening, nodes_of, scanned_by_postgres
from gateway.store import Store, at_once, schema
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission
from gateway.store.leases import LeaseRequest
from gateway.store.records import Future, FutureStatus, Outcome, Run, Usage
from gateway.store.settling import one_statement_settles
from tests.store.conftest import a_run, a_session, an_operation
from tests.store.test_futures import begun_run, claim_and_settle

KINDS = ("forward_backward", "forward_backward", "optim_step", "optim_step", "forward")
CLOCK = frozenset({"created_at", "started_at", "finished_at", "stored_at", "last_request_at"})


@pytest.fixture
async def postgres(pg_url: str) -> AsyncIterator[Store]:
    store = Store(Database(pg_url))
    store.start()
    yield store
    await store.close()


async def sent_by(store: Store, work: Callable[[], Awaitable[None]]) -> tuple[list[str], list[str]]:
    """The statements that are sent to the server meanwhile, and what the driver says by itself."""
    await store.database.barrier()
    writer = store.database._driver._writer  # type: ignore[attr-defined]
    connection = (await writer.get_raw_connection()).driver_connection
    spoken: list[str] = []
    with listening(store) as sent, connection.query_logger(lambda record: spoken.append(record.query)):
        await work()
        await asyncio.sleep(0.01)  # the driver tells a little later
    return [statement for statement, _ in sent], spoken


@pytest.mark.postgres
async def test_a_future_is_two_statements_and_no_more(postgres: Store) -> None:
    run = await begun_run(postgres)
    await claim_and_settle(postgres, an_operation(run, 0, "create_run"))
    step = an_operation(run, 1, "optim_step")

    async def submit_and_settle() -> None:
        await postgres.futures.submit(Submission(step, b"x"))
        claim = postgres.futures.claim_behind(Claim((step.request_id,), 1))
        usage = Usage("alice", run.session_id, "m", training_tokens=3)
        assert await postgres.futures.settle(Outcome(replace(step, epoch=1), b"r", usage=usage)) is not None
        assert claim.cancelled()

    sent, spoken = await sent_by(postgres, submit_and_settle)
    assert sent == [at_once._ACCEPT.strip(), at_once._SETTLE.strip()]
    assert spoken == []


@pytest.mark.postgres
async def test_what_is_more_than_one_statement_is_a_transaction(postgres: Store) -> None:
    run, other = await begun_run(postgres), await begun_run(postgres)
    await claim_and_settle(postgres, an_operation(run, 0, "create_run"))
    await postgres.futures.submit(Submission(an_operation(run, 1), b"x"))

    async def claim_and_settle_another() -> None:
        claimed = postgres.futures.claim_behind(Claim((f"{other.run_id}:0",), 1))
        assert await postgres.futures.settle(Outcome(replace(an_operation(run, 1), epoch=1), b"r"))
        assert claimed.done() and not claimed.cancelled()

    sent, spoken = await sent_by(postgres, claim_and_settle_another)
    assert [statement.split()[0] for statement in sent] == ["UPDATE", "WITH"]
    assert [words.strip(";") for words in spoken] == ["BEGIN", "COMMIT"]


@pytest.mark.postgres
async def test_a_plan_for_any_number_of_rows_finds_them_by_an_index(postgres: Store) -> None:
    """PostgreSQL keeps one plan for a statement that comes often, whatever its arrays hold."""
    await fill(postgres.database, 10_000)
    parameters = ", ".join(["NULL"] * (len(at_once._OUTCOME) + 2))

    def explain(connection: Connection) -> list[str]:
        connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        connection.exec_driver_sql(f"PREPARE settle AS {at_once._SETTLE}")
        answer = connection.exec_driver_sql(
            f"EXPLAIN (FORMAT JSON) EXECUTE settle({parameters})"
        ).scalar_one()
        nodes = nodes_of(answer)
        assert "futures" in {node.get("Relation Name") for node in nodes}
        return scanned_by_postgres(nodes)

    assert await postgres.database.read(explain) == []


@pytest.mark.postgres
async def test_a_statement_that_fails_leaves_nothing(postgres: Store) -> None:
    run = await begun_run(postgres)
    nobodys = an_operation(run, 1, run_id="nobody:train:0")
    with pytest.raises(IntegrityError):
        await postgres.futures.submit(Submission(nobodys, b"x"))
    assert await postgres.futures.get(nobodys.request_id) is None
    assert await postgres.futures.inputs([nobodys.request_id]) == {}
    assert await postgres.futures.submit(Submission(an_operation(run, 1), b"y"))


async def test_of_two_calls_under_one_number_one_is_new(store: Store) -> None:
    run = await begun_run(store)
    future = an_operation(run, 1)
    submitting = [store.futures.submit(Submission(future, body)) for body in (b"first", b"second")]
    assert await asyncio.gather(*submitting) == [True, False]
    assert await store.futures.inputs([future.request_id]) == {future.request_id: b"first"}


async def test_every_column_of_a_future_comes_back(store: Store) -> None:
    run = await begun_run(store)
    future = Future(
        "id", "bob", "e", "save_weights", 7, 1.5, run.run_id, "sampler", FutureStatus.FAILED, 3, 2, 1,
        {"a": [1, "é", None]}, "folder", b"\0d", b"\xffr", 0.25, 12, "wrong", "user", "e1", 2.5, 3.5,
    )  # fmt: skip
    await store.futures.submit(Submission(future, b""))
    assert await store.futures.get("id") == future
    assert await store.futures.inputs(["id"]) == {}


async def test_a_lease_taken_in_a_newer_epoch_refuses_an_outcome(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    for _ in range(2):
        await store.leases.take(LeaseRequest("e", "holder", 10.0))
    assert await store.futures.settle(Outcome(create, b"late", fence=1)) is None
    assert await store.futures.settle(Outcome(replace(create, epoch=1), b"late")) is None
    assert await store.futures.result(create.request_id) is None
    assert await store.futures.settle(Outcome(create, b"now", fence=2)) is not None


def test_two_of_one_run_are_no_single_statement() -> None:
    session = a_session()
    run, other = a_run(session), a_run(session, run_id="other")
    outcomes = [Outcome(an_operation(each, 1)) for each in (run, other)]
    samples = [Outcome(an_operation(run, n, "sample", run_id=None, request_id=f"s{n}")) for n in (1, 2)]
    assert one_statement_settles([*outcomes, *samples])
    assert not one_statement_settles([*outcomes, Outcome(an_operation(run, 2))])
    assert not one_statement_settles([samples[0], samples[0]])


# ---------------------------------------------------------------------------- the same as several statements


def outcome_of(chance: random.Random, future: Future) -> Outcome:
    """Anything that may become of a future, also by a sender whose epoch is over."""
    future = replace(future, epoch=chance.choice((None, 1, 2)), started_at=5.0)
    fence = chance.choice((None, 1, 2, 2))
    if chance.random() < 0.2:
        return Outcome(future, error="bad", error_category="user", error_id="e", fence=fence)
    summary = {"loss": chance.random(), "tokens": 4.0, "seconds": 0.5, "grad_norm": 2.0, "learning_rate": 0.1}
    kept = {name: value for name, value in summary.items() if chance.random() < 0.8}
    usage = Usage(future.owner, "s", "m", chance.randrange(3), sampled_tokens=chance.randrange(2))
    return Outcome(
        future, b"r" * chance.randrange(3) or None, b"digest", summary=kept, fence=fence,
        usage=usage if chance.random() < 0.7 else None,
    )  # fmt: skip


async def story(store: Store, seed: int) -> list[list[bool]]:
    """Runs and samples of one seed, settled in groups, in and out of turn; who was told that it settled what."""
    chance = random.Random(seed)
    session = await store.sessions.create(a_session(session_id=f"story{seed}"))
    runs = [a_run(session, run_id=f"{session.session_id}:train:{n}") for n in range(3)]
    await store.leases.take(LeaseRequest("e", "h", 10.0))
    waiting = [await submitted(store, an_operation(run, 0, "create_run"), run) for run in runs]
    for seq in range(1, 5):
        waiting += [await submitted(store, an_operation(run, seq, chance.choice(KINDS))) for run in runs]
    waiting += [
        await submitted(store, an_operation(runs[0], n, "sample", request_id=f"{seed}:{n}", run_id=None))
        for n in range(6)
    ]
    told = []
    for _ in range(80):
        group: dict[str, Outcome] = {}
        for future in chance.sample(waiting, chance.randrange(1, 5)):
            group.setdefault(future.run_id or future.request_id, outcome_of(chance, future))
        if chance.random() < 0.3:
            claimed = next(iter(group.values())).future.request_id
            with contextlib.suppress(IntegrityError):  # another one of its run is running
                await store.futures.claim_behind(Claim((claimed,), 1))
        settled = await asyncio.gather(*(store.futures.settle(outcome) for outcome in group.values()))
        told.append([each is not None for each in settled])
    return told


async def submitted(store: Store, future: Future, run: Run | None = None) -> Future:
    await store.futures.submit(Submission(future, b"x", run))
    return future


async def contents(store: Store) -> dict[str, list[dict[str, Any]]]:
    """All that settling writes, without the times of its clock."""
    found = {}
    for name in ("futures", "inputs", "results", "steps", "runs", "usage"):
        table = schema.metadata.tables[name]
        rows: Sequence[Any] = await store.database.rows(select(table).order_by(*table.primary_key.columns))
        found[name] = [{k: v for k, v in row._mapping.items() if k not in CLOCK} for row in rows]
    return found


@pytest.mark.postgres
@pytest.mark.parametrize("seed", range(4))
async def test_it_settles_as_several_statements_do(
    pg_server: Any, _pg_template: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, found = [], []
    for in_one in (one_statement_settles, lambda _: False):
        monkeypatch.setattr("gateway.store.settling.one_statement_settles", in_one)
        store = Store(Database(pg_server.url(pg_server.create_database(_pg_template))))
        store.start()
        try:
            told.append(await story(store, seed))
            found.append(await contents(store))
        finally:
            await store.close()
    assert told[0] == told[1]
    assert {True, False} <= {each for group in told[0] for each in group}
    assert found[0] == found[1]
    assert found[0]["steps"] and found[0]["usage"] and found[0]["results"]
