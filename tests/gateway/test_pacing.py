"""Work in the background rests between its batches, and only one of it is under way."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.pacing import Pace
from gateway.settings import Settings
from gateway.snapshot_duties import prune_inputs, remove_needless
from gateway.snapshot_files import SnapshotFiles
from gateway.store import Store

BATCH_S = 0.02


class Batches:
    """In place of the database: each transaction takes its time, and leaves its name and when it was."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self.left = {"prune": 3, "forget": 3}

    async def work(self, name: str) -> bool:
        began = time.monotonic()
        await asyncio.sleep(BATCH_S)
        self.spans.append((name, began, time.monotonic()))
        self.left[name] -= 1
        return self.left[name] >= 0

    async def prunable(self, limit: int) -> list[str]:
        return ["run"] if self.left["prune"] > 0 else []

    async def prune(self, run_id: str) -> int:
        return 64 if await self.work("prune") else 0

    async def forget(self, limit: int, superseded_for: float) -> list[str]:
        return ["snapshots/one"] if await self.work("forget") else []


class Rows:
    def __init__(self) -> None:
        self.snapshots = Batches()


@pytest.mark.parametrize("duties", [("prune",), ("forget",), ("prune", "forget")])
async def test_duties_of_snapshots_leave_the_writer_to_others(
    duties: tuple[str, ...], tmp_path: Path
) -> None:
    rows, pace = Rows(), Pace()
    store, files = cast(Store, rows), SnapshotFiles(Settings(data_dir=tmp_path))
    work: dict[str, Any] = {
        "prune": lambda: prune_inputs(store, pace),
        "forget": lambda: remove_needless(store, files, 60, pace),
    }
    found = await asyncio.gather(*(work[name]() for name in duties))
    assert found == [{"prune": 3 * 64, "forget": 3}[name] for name in duties]
    spans = rows.snapshots.spans
    assert {name for name, _, _ in spans} == set(duties)
    for (_, began, ended), (_, following, _) in itertools.pairwise(spans):
        assert following - ended >= 3.5 * (ended - began)
