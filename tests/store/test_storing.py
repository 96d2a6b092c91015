"""A database that answers but stores nothing is known to, and found well again by a trial."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import OperationalError

from gateway.errors import StoreUnavailable
from gateway.store import Store, schema
from tests.store.conftest import a_session


def no_room() -> Exception:
    why = sqlite3.OperationalError("database or disk is full")
    why.sqlite_errorcode = sqlite3.SQLITE_FULL
    return OperationalError("INSERT", None, why)


class Disk:
    """Whether there is room, and how often something was written."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = store.database._driver.write
        self.full = False
        self.writes = 0
        monkeypatch.setattr(store.database._driver, "write", self.write)

    async def write(self, work: Callable[[Connection], Any], **how: Any) -> Any:
        self.writes += 1
        if self.full:
            raise no_room()
        return await self._write(work, **how)


@pytest.fixture
def disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(store, monkeypatch)


async def test_nothing_is_written_to_find_out_that_all_is_well(store: Store, disk: Disk) -> None:
    await store.sessions.create(a_session())
    before = disk.writes
    assert await store.problem() is None
    assert disk.writes == before


async def test_a_full_disk_is_a_problem_until_there_is_room(store: Store, disk: Disk) -> None:
    disk.full = True
    with pytest.raises(StoreUnavailable):
        await store.sessions.create(a_session())
    for _ in range(3):
        assert "disk is full" in (await store.problem() or "")
    disk.full = False
    async with asyncio.timeout(30):
        while await store.problem() is not None:  # noqa: ASYNC110 - nobody else writes, and nobody tells
            await asyncio.sleep(0.1)
    [row] = await store.database.rows(select(func.count()).select_from(schema.inputs))
    assert row[0] == 0  # a trial leaves nothing behind


async def test_many_who_ask_are_one_trial_a_second(store: Store, disk: Disk) -> None:
    disk.full = True
    with pytest.raises(StoreUnavailable):
        await store.sessions.create(a_session())
    before, began = disk.writes, time.monotonic()
    for _ in range(20):
        await asyncio.gather(*(store.problem() for _ in range(10)))
    assert disk.writes - before <= 2 + time.monotonic() - began


async def test_what_is_small_does_not_hide_it(store: Store, disk: Disk) -> None:
    """On a full disk a lease is renewed where there was room before."""
    disk.full = True
    with pytest.raises(StoreUnavailable):
        await store.sessions.create(a_session())
    disk.full = False
    await store.sessions.create(a_session())
    assert store.database.storing.problem is not None


async def test_an_outage_is_told_once_in_the_log(
    store: Store, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.full = True
    for _ in range(30):
        with pytest.raises(StoreUnavailable):
            await store.sessions.create(a_session())
    told = [record.message for record in caplog.records if record.name.startswith("gateway")]
    assert told == ["the database cannot do what it was asked: database or disk is full"]
    disk.full = False
    await store.database.try_to_store()
    assert "stores again what it is given" in caplog.records[-1].message
