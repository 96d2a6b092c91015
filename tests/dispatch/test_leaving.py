"""Runs that leave an engine's memory are copied first, and come back from that copy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from engines.messages import Failure
from gateway.dispatch import snapshots
from gateway.dispatch.quarantine import Quarantine
from gateway.engine_process import EngineProcess
from gateway.store.records import FutureStatus, Run
from tests.dispatch.snapshotting import SmallEngine, SnapshotPlace, fed, until


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Room for one run; no snapshot is taken while a run stays."""
    async with fed(tmp_path, SmallEngine(places=1), snapshot_steps=0, snapshot_s=0.0) as place:
        yield place


@pytest.fixture
async def roomy(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Room for all."""
    async with fed(tmp_path, SmallEngine(places=9), snapshot_steps=0, snapshot_s=0.0) as place:
        yield place


def resident(place: SnapshotPlace) -> list[str]:
    assert isinstance(place.engine, SmallEngine)
    return list(place.engine.runs)


def applied(place: SnapshotPlace, run: Run) -> list[int]:
    assert isinstance(place.engine, SmallEngine)
    return place.engine.runs[run.run_id]


async def test_a_run_that_makes_room_comes_back_from_where_it_left(small: SnapshotPlace) -> None:
    first = await small.begin("alice")
    await small.steps(first, 3)
    second = await small.begin("bob")
    await small.steps(second, 1)
    assert small.engine.snapshots(first) == [6]
    await small.steps(first, 1)
    assert small.engine.restored == [6]
    assert small.engine.replayed(first) == []
    assert applied(small, first) == [*range(9)]
    assert await small.kept(second) == [2]


async def test_one_that_its_newest_snapshot_covers_is_not_copied_again(small: SnapshotPlace) -> None:
    first = await small.begin("alice")
    await small.steps(first, 2)
    assert await asyncio.wait_for(small.lane.snapshots.request(first.run_id), 5)
    await small.begin("bob")
    assert resident(small) != [first.run_id]
    assert small.engine.snapshots(first) == [4]
    await small.steps(first, 1)
    await small.begin("carol")
    await small.registered(first, 6, 4)
    assert small.engine.snapshots(first) == [4, 6]


async def test_one_in_the_middle_of_a_step_comes_back_from_the_snapshot_before(small: SnapshotPlace) -> None:
    first = await small.begin("alice")
    await small.steps(first, 2)
    await small.begin("bob")
    await small.next(first)
    await small.begin("carol")
    await small.next(first)
    assert small.engine.snapshots(first) == [4]
    assert small.engine.replayed(first) == [5]
    assert applied(small, first) == [*range(7)]


async def test_one_that_is_wanted_again_at_once_waits_for_its_snapshot_and_nobody_else_does(
    roomy: SnapshotPlace,
) -> None:
    first, second = await roomy.begin("alice"), await roomy.begin("bob")
    await roomy.steps(first, 2)
    roomy.engine.holds = True
    roomy.lane.drop(first.run_id)
    await until(lambda: resident(roomy) == [second.run_id])
    future = await roomy.submit(first, 5)
    await roomy.steps(second, 3)
    assert future.request_id not in roomy.settled
    assert resident(roomy) == [second.run_id]
    roomy.engine.release()
    assert (await roomy.outcome(future)).status is FutureStatus.DONE
    assert roomy.engine.restored == [4]
    assert roomy.engine.replayed(first) == []
    assert applied(roomy, first) == [*range(6)]


async def test_one_whose_snapshot_takes_too_long_comes_back_without_it(
    roomy: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_PATIENCE_S", 0.05)
    run = await roomy.begin("alice")
    await roomy.steps(run, 2)
    roomy.engine.holds = True
    roomy.lane.drop(run.run_id)
    await until(lambda: not resident(roomy))
    await roomy.next(run)
    assert roomy.engine.snapshots(run) == [4]
    assert roomy.engine.replayed(run) == [*range(5)]
    roomy.engine.release()
    await roomy.registered(run, 4)


async def test_a_snapshot_that_fails_costs_a_longer_replay_and_nothing_else(
    small: SnapshotPlace, caplog: pytest.LogCaptureFixture
) -> None:
    first = await small.begin("alice")
    await small.steps(first, 2)
    small.engine.refusal = Failure("server", "No space left on device", "abc")
    await small.begin("bob")
    await small.steps(first, 1)
    assert small.engine.snapshots(first) == [4]
    assert small.engine.restored == []
    assert applied(small, first) == [*range(7)]
    assert "No space left on device" in caplog.text


async def test_who_has_asked_for_a_snapshot_is_told_of_the_one_that_the_run_leaves_with(
    roomy: SnapshotPlace,
) -> None:
    runs = [await roomy.begin(owner) for owner in ("alice", "bob", "carol")]
    for run in runs:
        await roomy.steps(run, 1)
    roomy.engine.holds = True
    asked = [roomy.lane.snapshots.request(run.run_id) for run in runs]
    await until(lambda: [roomy.engine.snapshots(run) for run in runs] == [[2], [2], []])
    roomy.lane.drop(runs[2].run_id)
    await until(lambda: len(resident(roomy)) == 2)
    assert roomy.engine.snapshots(runs[2]) == [2]  # it cannot wait until the others are written
    roomy.engine.release()
    assert await asyncio.wait_for(asyncio.gather(*asked), 5) == [True, True, True]


async def test_four_leave_at_a_time(roomy: SnapshotPlace) -> None:
    runs = [await roomy.begin("alice") for _ in range(6)]
    for run in runs:
        await roomy.steps(run, 1)
    roomy.engine.holds = True
    for run in runs:
        roomy.lane.drop(run.run_id)
    await until(lambda: len(resident(roomy)) == 2)
    await asyncio.sleep(0.05)
    assert len(resident(roomy)) == 2
    roomy.engine.holds = False
    roomy.engine.release()
    await until(lambda: not resident(roomy))
    for run in runs:
        await roomy.registered(run, 2)


async def test_what_was_being_written_when_all_was_forgotten_keeps_nobody_waiting(
    roomy: SnapshotPlace,
) -> None:
    run = await roomy.begin("alice")
    await roomy.steps(run, 1)
    roomy.engine.holds = True
    roomy.lane.drop(run.run_id)
    await until(lambda: not resident(roomy))
    assert roomy.lane.snapshots.left(run.run_id) is not None
    roomy.lane.snapshots.reset()
    roomy.lane.snapshots.serve(cast(EngineProcess, roomy.engine))
    async with asyncio.timeout(5):
        await roomy.next(run)
    assert applied(roomy, run) == [*range(4)]


async def test_a_lane_that_is_woken_and_cancelled_at_once_ends(roomy: SnapshotPlace) -> None:
    await roomy.begin("alice")
    again = asyncio.create_task(roomy.lane.feed(cast(EngineProcess, roomy.engine), Quarantine()))
    await asyncio.sleep(0.05)
    roomy.lane.drop("nobody")
    again.cancel()
    _, running = await asyncio.wait([again], timeout=2)
    assert not running


async def test_runs_take_longer_turns_where_writing_a_copy_takes_long(small: SnapshotPlace) -> None:
    """Ten times as long as a change of places: else the disk would be busy with copies all the time."""
    small.engine.writing_s = 0.2
    runs = [await small.begin(owner) for owner in ("alice", "bob")]
    for run in [*runs, *runs, *runs]:
        await small.steps(run, 1)
    evictions = small.lane.residency.evictions
    started = time.monotonic()
    done = [
        await small.submit(run, seq, "forward_backward" if seq % 2 else "optim_step")
        for seq in range(7, 207)
        for run in runs
    ]
    small.engine.pause_s = 0.002
    for future in done:
        await small.outcome(future)
    changes = small.lane.residency.evictions - evictions
    assert changes <= 2 + (time.monotonic() - started) / 0.5


async def test_a_lane_that_is_closed_waits_for_the_snapshot_of_a_run_that_has_just_left(
    tmp_path: Path,
) -> None:
    async with fed(tmp_path, SmallEngine(places=9), snapshot_steps=0, snapshot_s=0.0) as place:
        run = await place.begin("alice")
        await place.steps(run, 1)
        place.engine.holds = True
        place.lane.drop(run.run_id)
        await until(lambda: not resident(place))
        ended = asyncio.create_task(place.lane.snapshots.take_all())
        await asyncio.sleep(0.02)
        assert not ended.done()
        place.engine.release()
        await asyncio.wait_for(ended, 5)
        assert await place.kept(run) == [2]
