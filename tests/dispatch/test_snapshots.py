"""When snapshots of a run are taken, and what becomes of those that cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engines.messages import Failure, Outcome, Performed
from gateway.pacing import Pace
from gateway.snapshot_duties import prune_inputs
from gateway.store.leases import LeaseRequest
from tests.dispatch.snapshotting import SnapshotPlace, fed, until


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Snapshots every two steps."""
    async with fed(tmp_path, snapshot_steps=2, snapshot_s=0.0) as place:
        yield place


@pytest.fixture
async def quiet_place(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Snapshots when they are asked for."""
    async with fed(tmp_path, snapshot_steps=0, snapshot_s=0.0) as place:
        yield place


# ---------------------------------------------------------------------------- when


async def test_a_snapshot_is_begun_every_so_many_steps_before_the_next_operation(
    place: SnapshotPlace,
) -> None:
    run = await place.begin("alice")
    kinds = ["forward_backward", "forward_backward", "optim_step"] * 5
    futures = [await place.submit(run, seq, kind) for seq, kind in enumerate(kinds, 1)]
    for future in futures:
        await place.outcome(future)
    await place.registered(run, 12, 6)
    order = [(kind, runs[0].seq_id) for kind, runs, _ in place.engine.calls]
    assert place.engine.snapshots(run) == [6, 12]
    for seq in (6, 12):
        where = order.index(("snapshot", seq))
        assert order[where - 1] == ("optim_step", seq)
    [newest, _] = await place.store.snapshots.of_run(run.run_id)
    assert (newest.step, newest.size_bytes) == (4, 3)


async def test_a_snapshot_is_taken_at_the_first_step_after_some_time(tmp_path: Path) -> None:
    async with fed(tmp_path, snapshot_steps=0, snapshot_s=0.2) as place:
        run = await place.begin("alice")
        await place.steps(run, 1)
        assert place.engine.snapshots(run) == []
        await asyncio.sleep(0.2)
        await place.next(run)
        assert place.engine.snapshots(run) == []  # gradients are pending
        await place.next(run)
        await place.registered(run, 4)
        await place.steps(run, 1)
        assert place.engine.snapshots(run) == [4]


@pytest.fixture
async def slow_place(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Snapshots after so many steps that nobody takes them."""
    async with fed(tmp_path, snapshot_steps=100, snapshot_s=0.0) as place:
        yield place


async def test_passes_without_a_step_are_bounded_by_snapshots_with_their_gradient(
    slow_place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.snapshots._STEPLESS", 4)
    place = slow_place
    run = await place.begin("alice")
    numbers = iter(range(1, 99))

    async def passes(count: int, kind: str = "forward_backward") -> None:
        for _ in range(count):
            await place.outcome(await place.submit(run, next(numbers), kind))

    await passes(3)
    await passes(5, "forward")
    assert place.engine.snapshots(run) == []
    await passes(5)
    await place.registered(run, 13, 9)
    await passes(3)
    assert await prune_inputs(place.store, Pace()) > 0
    there = [number for number in range(17) if await place.store.futures.input_at(run.run_id, number)]
    assert there == [0, 10, 11, 12, 13, 14, 15, 16]
    place.leave_memory(run)
    await passes(1)
    assert (place.engine.restored, place.engine.replayed(run)) == ([13], [14, 15, 16])
    await place.registered(run, 17, 13)  # those that were replayed count
    await passes(1, "optim_step")
    await passes(3)
    assert await place.kept(run) == [17, 13]  # a step ends the count
    await passes(1, "load_weights")  # does not: what it needs is an input too
    await place.registered(run, 22, 17)


async def test_a_run_that_was_restored_with_a_gradient_stays_like_one_in_the_middle_of_a_step(
    slow_place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.snapshots._STEPLESS", 2)
    place = slow_place
    run = await place.begin("alice")
    restored: list[bool] = []
    note = place.lane.residency.restored

    def noting(run_id: str, size: int | None, seconds: float, *, pending: bool) -> None:
        restored.append(pending)
        note(run_id, size, seconds, pending=pending)

    monkeypatch.setattr(place.lane.residency, "restored", noting)
    for number, kind in enumerate(["forward_backward", "forward_backward", "optim_step"], 1):
        await place.outcome(await place.submit(run, number, kind))
        if number == 2:
            await place.registered(run, 2)
            place.leave_memory(run)
    assert (place.engine.restored, place.engine.replayed(run), restored) == ([2], [], [True])
    assert await asyncio.wait_for(place.lane.snapshots.request(run.run_id), 5)
    place.leave_memory(run)
    await place.outcome(await place.submit(run, 4, "forward_backward"))
    assert (place.engine.restored, restored) == ([2, 3], [True, False])


async def test_where_none_are_wanted_none_are_taken_without_a_step(
    quiet_place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.snapshots._STEPLESS", 2)
    run = await quiet_place.begin("alice")
    for number in range(1, 5):
        await quiet_place.outcome(await quiet_place.submit(run, number, "forward_backward"))
    assert quiet_place.engine.snapshots(run) == []


async def test_failed_steps_do_not_count(place: SnapshotPlace) -> None:
    run = await place.begin("alice")
    bad = Performed(0, [Outcome(Failure("user", "bad"))])
    place.engine.script = lambda call: bad if call[1][0].seq_id == 2 else None
    for _ in range(4):
        await place.next(run)
    assert place.engine.snapshots(run) == []
    await place.steps(run, 1)
    await place.registered(run, 6)


async def test_one_snapshot_of_a_run_is_under_way_at_a_time(place: SnapshotPlace) -> None:
    run = await place.begin("alice")
    place.engine.holds = True
    await place.steps(run, 7)
    assert place.engine.snapshots(run) == [4]
    place.engine.holds = False
    place.engine.release()
    await place.registered(run, 14, 4)  # the next one was overdue
    assert place.engine.snapshots(run) == [4, 14]


async def test_few_snapshots_of_an_engine_are_under_way_at_a_time(place: SnapshotPlace) -> None:
    runs = [await place.begin(owner) for owner in ("alice", "bob", "carol")]
    place.engine.holds = True
    for run in runs:
        await place.steps(run, 2)
    assert [place.engine.snapshots(run) for run in runs] == [[4], [4], []]
    place.engine.holds = False
    place.engine.release()
    for run in runs:
        await place.registered(run, 4)  # the third one too, though nothing more is asked of its run


# ---------------------------------------------------------------------------- on request


async def test_what_is_asked_for_is_taken_at_once_where_the_run_stands(quiet_place: SnapshotPlace) -> None:
    place = quiet_place
    run = await place.begin("alice")
    assert place.lane.snapshots.covered(run.run_id)  # its creation is all that there is
    await place.steps(run, 3)
    assert place.engine.snapshots(run) == []
    assert not place.lane.snapshots.covered(run.run_id)
    assert await asyncio.wait_for(place.lane.snapshots.request(run.run_id), 5)
    assert await place.kept(run) == [6]
    assert place.lane.snapshots.covered(run.run_id)
    assert await place.lane.snapshots.request(run.run_id)
    assert place.engine.snapshots(run) == [6]  # nothing has changed since


async def test_what_is_asked_for_waits_for_the_next_boundary(quiet_place: SnapshotPlace) -> None:
    place = quiet_place
    run = await place.begin("alice")
    await place.next(run)
    asked = place.lane.snapshots.request(run.run_id)
    also = place.lane.snapshots.request(run.run_id)
    await asyncio.sleep(0.02)
    assert not asked.done()
    await place.next(run)
    assert await asyncio.wait_for(asked, 5) and await also
    assert place.engine.snapshots(run) == [2]


async def test_one_that_is_under_way_is_too_old_for_a_request(quiet_place: SnapshotPlace) -> None:
    place = quiet_place
    run = await place.begin("alice")
    await place.steps(run, 1)
    place.engine.holds = True
    first = place.lane.snapshots.request(run.run_id)
    await until(lambda: place.engine.snapshots(run) == [2])
    await place.steps(run, 1)
    second = place.lane.snapshots.request(run.run_id)
    place.engine.holds = False
    place.engine.release()
    assert await asyncio.wait_for(first, 5)
    assert await asyncio.wait_for(second, 5)
    assert await place.kept(run) == [4, 2]


async def test_a_request_ends_with_the_runs_stay_in_memory(quiet_place: SnapshotPlace) -> None:
    place = quiet_place
    run = await place.begin("alice")
    assert not await place.lane.snapshots.request("nobody")
    await place.next(run)
    asked = place.lane.snapshots.request(run.run_id)
    place.lane.drop(run.run_id)
    assert not await asyncio.wait_for(asked, 5)
    assert place.engine.snapshots(run) == []


# ---------------------------------------------------------------------------- when it does not work


async def test_a_snapshot_that_cannot_be_written_is_told_and_costs_nothing(
    place: SnapshotPlace, caplog: pytest.LogCaptureFixture
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 2)
    await place.registered(run, 4)
    place.engine.refusal = Failure("server", "No space left on device", "abc")
    await place.steps(run, 2)
    await until(lambda: bool(place.lane.snapshots.problems))
    assert place.lane.snapshots.problems == {run.run_id: "No space left on device"}
    assert "No space left on device" in caplog.text
    assert not await asyncio.wait_for(place.lane.snapshots.request(run.run_id), 5)
    assert await place.kept(run) == [4]
    place.engine.refusal = None
    await place.steps(run, 2)
    await place.registered(run, 12, 4)
    await until(lambda: not place.lane.snapshots.problems)


async def test_a_gateway_that_was_replaced_registers_nothing(place: SnapshotPlace, tmp_path: Path) -> None:
    run = await place.begin("alice")
    place.engine.holds = True
    await place.steps(run, 2)
    assert await place.store.leases.take(LeaseRequest("e", "us", 600)) == 2
    written = tmp_path / "storage" / "snapshots"
    place.engine.release()
    await until(lambda: bool(place.lane.snapshots.problems))
    assert "own" in place.lane.snapshots.problems[run.run_id]
    assert await place.kept(run) == []
    assert not written.exists()
