"""Records in memory: read once, and again whenever something of them may have changed."""

from __future__ import annotations

import asyncio

from gateway.state import Remembered


class SlowTable:
    """One record, which is read at once and arrives when it is let go."""

    def __init__(self) -> None:
        self.row = "active"
        self.reads = 0
        self.arrives = asyncio.Event()
        self.arrives.set()

    async def get(self, key: str) -> str | None:
        self.reads += 1
        row = self.row
        await self.arrives.wait()
        return row


async def test_a_record_is_read_once() -> None:
    table = SlowTable()
    remembered = Remembered(table.get)
    assert [await remembered.get("run") for _ in range(3)] == ["active"] * 3
    assert table.reads == 1


async def test_a_record_that_changes_while_it_is_read_is_not_kept() -> None:
    table = SlowTable()
    remembered = Remembered(table.get)
    table.arrives.clear()
    early = asyncio.create_task(remembered.get("run"))
    await asyncio.sleep(0)
    table.row = "unloaded"
    remembered.forget("run")
    table.arrives.set()
    assert await early == "active"  # what it was when it was asked for
    assert await remembered.get("run") == "unloaded"


async def test_while_others_may_change_it_a_record_is_read_each_time() -> None:
    table = SlowTable()
    shared = False
    remembered = Remembered(table.get, shared=lambda: shared)
    await remembered.get("run")
    shared = True
    table.row = "unloaded"
    assert await remembered.get("run") == "unloaded"
    assert table.reads == 2


async def test_the_oldest_record_goes_first() -> None:
    table = SlowTable()
    remembered = Remembered(table.get, largest=2)
    for key in ("a", "b", "c", "b", "c", "a"):
        await remembered.get(key)
    assert table.reads == 4
