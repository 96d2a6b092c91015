"""What a commit is worth: what was accepted survives a power loss, what can be computed again need not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.errors import StoreUnavailable
from gateway.migrate import upgrade
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission
from gateway.store.records import FutureStatus, Outcome
from tests.store.conftest import an_operation
from tests.store.test_futures import begun_run

NORMAL, FULL = 1, 2
"""SQLite's numbers for `PRAGMA synchronous`."""


def levels(connection: Connection, wanted: list[None]) -> list[int]:
    """A write that reports how far the commit of its transaction will go."""
    return [int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one()) for _ in wanted]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await upgrade(database)
    database.start()
    yield database
    await database.close()


async def test_a_plain_write_is_flushed_and_a_recomputable_one_is_not(database: Database) -> None:
    assert await database.write(levels, None) == FULL
    assert await database.write(levels, None, recomputable=True) == NORMAL
    assert await database.write(levels, None) == FULL


async def test_a_transaction_with_both_is_flushed(database: Database) -> None:
    both = await asyncio.gather(database.write(levels, None, recomputable=True), database.write(levels, None))
    assert list(both) == [FULL, FULL]


async def test_a_setting_of_normal_is_never_raised(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    database.start()
    assert await database.write(levels, None) == NORMAL
    await database.close()


async def test_a_write_behind_goes_along_with_the_next_one_and_before_it(database: Database) -> None:
    order: list[str] = []

    def note(connection: Connection, names: list[str]) -> list[int]:
        order.extend(names)
        return [id(connection.get_transaction()) for _ in names]

    behind = database.write_behind(note, "behind")
    await asyncio.sleep(0)
    assert not behind.done()
    assert await database.write(note, "next") == await behind
    assert order == ["behind", "next"]


async def test_a_write_behind_does_not_wait_for_ever(database: Database) -> None:
    assert await asyncio.wait_for(database.write_behind(levels, None), 5) == NORMAL


async def test_a_write_behind_is_committed_on_close(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await upgrade(database)
    database.start()
    behind = database.write_behind(levels, None)
    await database.close()
    assert behind.result() == NORMAL


async def test_a_claim_behind_counts_and_is_settled(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    claim = store.futures.claim_behind(Claim((create.request_id,), 3))
    settled = await store.futures.settle(Outcome(replace(create, epoch=3), result=b"r"))
    assert claim.done()
    assert settled is not None
    stored = await store.futures.get(create.request_id)
    assert stored is not None
    assert (stored.status, stored.epoch, stored.attempts) == (FutureStatus.DONE, 3, 1)


async def test_a_claim_behind_of_an_older_epoch_settles_nothing(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    await store.futures.claim(Claim((create.request_id,), 4))
    await store.futures.claim_behind(Claim((create.request_id,), 3))
    assert await store.futures.settle(Outcome(replace(create, epoch=3), result=b"r")) is None
    stored = await store.futures.get(create.request_id)
    assert stored is not None
    assert (stored.status, stored.epoch) == (FutureStatus.RUNNING, 4)


async def test_claims_behind_of_two_engines_keep_their_epochs(store: Store) -> None:
    one, other = await begun_run(store), await begun_run(store)
    claims = [Claim((f"{run.run_id}:0",), epoch) for run, epoch in ((one, 2), (other, 7))]
    await asyncio.gather(*(store.futures.claim_behind(claim) for claim in claims))
    stored = [await store.futures.get(claim.request_ids[0]) for claim in claims]
    assert [future.epoch for future in stored if future is not None] == [2, 7]


async def cut_connections(url: str) -> None:
    """End every connection of the database, as a restart of the server or a firewall does."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
        await connection.exec_driver_sql(cut + "pg_backend_pid()")
    await engine.dispose()


@pytest.mark.postgres
async def test_a_connection_cut_while_idle_is_made_anew(pg_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.drivers._PING_AFTER_S", 0.0)
    store = Store(Database(pg_url))
    store.start()
    await begun_run(store)
    await cut_connections(pg_url)
    await begun_run(store)
    await store.close()


@pytest.mark.postgres
async def test_a_connection_cut_in_use_fails_one_write_and_no_other(
    pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.drivers._PING_AFTER_S", 60.0)
    store = Store(Database(pg_url))
    store.start()
    run = await begun_run(store)
    await cut_connections(pg_url)
    with pytest.raises(StoreUnavailable):
        await store.futures.submit(Submission(an_operation(run, 1), b"lost"))
    assert await store.futures.submit(Submission(an_operation(run, 1), b"again"))
    assert await store.futures.inputs([f"{run.run_id}:1"]) == {f"{run.run_id}:1": b"again"}
    await store.close()


async def test_an_outcome_is_not_flushed_and_a_failure_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure need not follow from the log: a gap that stayed open, a sample that was given up."""
    run = await begun_run(store)
    create = replace(an_operation(run, 0, "create_run"), epoch=1)
    failing = replace(an_operation(run, 1), epoch=1)
    await store.futures.submit(Submission(failing, b""))
    await store.futures.claim(Claim((create.request_id,), 1))
    flushes: list[bool] = []
    write = store.database._driver.write

    async def noted(work: Any, *, flushed: bool, one_statement: bool) -> Any:
        flushes.append(flushed)
        return await write(work, flushed=flushed, one_statement=one_statement)

    monkeypatch.setattr(store.database._driver, "write", noted)
    assert await store.futures.settle(Outcome(create, result=b"r")) is not None
    await store.futures.settle(Outcome(failing, error="gap", error_category="user"))
    assert flushes == [False, True]
