"""A lane that is closed leaves snapshots of where its runs stand."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engines.messages import Failure
from tests.dispatch.snapshotting import fed, until


async def test_runs_at_a_boundary_have_a_snapshot_when_the_lane_has_ended(tmp_path: Path) -> None:
    async with fed(tmp_path, snapshot_steps=0, snapshot_s=0.0) as place:
        runs = [await place.begin(owner) for owner in ("alice", "bob", "carol", "dave")]
        for run in runs[:3]:
            await place.steps(run, 2)
        await place.next(runs[3])
        assert [await place.kept(run) for run in runs] == [[]] * 4
        place.lane.close()
        await until(lambda: len(place.engine.calls) >= 4 * 4 + 1)
        for run in runs[:3]:
            await place.registered(run, 4)
        assert await place.kept(runs[3]) == []  # in the middle of a step


async def test_a_snapshot_that_fails_does_not_keep_the_lane_open(tmp_path: Path) -> None:
    async with fed(tmp_path, snapshot_steps=0, snapshot_s=0.0) as place:
        run = await place.begin("alice")
        await place.steps(run, 1)
        place.engine.holds = True
        place.lane.close()
        await until(lambda: place.engine.snapshots(run) == [2])
        asked = place.lane.snapshots.request(run.run_id)
        place.engine.refusal = Failure("server", "the folder is gone")
        place.engine.release()
        assert not await asyncio.wait_for(asked, 5)
