"""What a run is restored from, and whether its replay gives the numbers that it gave before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engines.messages import Failure, Outcome, Performed
from gateway.pacing import Pace
from gateway.snapshot_duties import prune_inputs
from gateway.snapshot_files import SnapshotFiles, SnapshotsUnreachable
from gateway.store.records import FutureStatus, Run
from tests.dispatch.snapshotting import SnapshotPlace, fed, until
from tests.dispatch.test_training import Call


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[SnapshotPlace]:
    """Snapshots every two steps."""
    async with fed(tmp_path, snapshot_steps=2, snapshot_s=0.0) as place:
        yield place


# ---------------------------------------------------------------------------- restored


async def test_a_run_is_restored_from_its_newest_snapshot_and_the_operations_behind_it(
    place: SnapshotPlace,
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 5)
    await place.registered(run, 8, 4)
    await place.next(run)  # a pass without its step
    place.leave_memory(run)
    assert (await place.next(run)).status is FutureStatus.DONE
    assert (place.engine.restored, place.engine.bodies) == ([8], [b"input"])
    assert place.engine.replayed(run) == [9, 10, 11]
    await place.registered(run, 12, 8)  # two steps since: those that were replayed count


async def test_what_comes_later_is_no_part_of_a_restoration(place: SnapshotPlace) -> None:
    """A log whose last operation is a boundary: nothing is applied again."""
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    place.leave_memory(run)
    await place.next(run)
    assert (place.engine.restored, place.engine.replayed(run)) == ([8], [])


def damage(name: str) -> Failure:
    return Failure("user", f"{name} is not what was written")


async def test_a_damaged_snapshot_is_reported_and_the_one_before_is_taken(
    place: SnapshotPlace, caplog: pytest.LogCaptureFixture
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 5)
    await place.registered(run, 8, 4)
    assert await prune_inputs(place.store, Pace()) == 4
    place.engine.damaged = {8: damage("weights")}
    place.leave_memory(run)
    await place.next(run)
    assert place.engine.restored == [8, 4]
    assert place.engine.replayed(run) == [5, 6, 7, 8, 9, 10]
    newest, older = await place.store.snapshots.of_run(run.run_id)
    assert (newest.damage, older.damage) == ("weights is not what was written", None)
    assert "after operation 8 is damaged: weights is not what was written" in caplog.text
    await place.next(run)
    await place.registered(run, 12, 8, 4)  # two intact ones again
    place.leave_memory(run)
    place.engine.damaged[12] = damage("weights")
    await place.next(run)
    assert place.engine.restored == [8, 4, 12, 4]  # the one that was damaged is not asked first


async def test_without_an_intact_snapshot_the_whole_log_is_applied(place: SnapshotPlace) -> None:
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    place.engine.damaged = {8: damage("weights"), 4: damage("moments")}
    place.leave_memory(run)
    assert (await place.next(run)).status is FutureStatus.DONE
    assert place.engine.replayed(run) == list(range(9))


async def test_what_cannot_be_restored_fails_clearly_and_comes_back_with_its_files(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.returning._AGAIN_S", 0.001)
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    await prune_inputs(place.store, Pace())
    place.engine.damaged = {8: damage("weights"), 4: damage("moments")}
    place.leave_memory(run)
    failed = await place.next(run)
    assert (failed.status, failed.error_category) == (FutureStatus.FAILED, "server")
    for words in ("after operation 8: weights", "after operation 4: moments", "up to 4", run.run_id):
        assert words in (failed.error or "")
    place.engine.damaged = {}  # a folder is mounted again
    assert (await place.next(run)).status is FutureStatus.DONE
    assert place.engine.restored[-1] == 8
    assert {each.damage for each in await place.store.snapshots.of_run(run.run_id)} == {
        None,
        "moments is not what was written",
    }


async def test_an_engine_that_breaks_at_restoring_is_not_taken_for_damage(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.returning._AGAIN_S", 0.05)
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    place.engine.damaged = {8: Failure("server", "out of memory", "abc")}
    place.leave_memory(run)
    outcome = asyncio.create_task(place.next(run))
    await until(lambda: bool(place.engine.restored))
    place.engine.damaged = {}
    assert (await outcome).status is FutureStatus.DONE
    assert place.engine.restored == [8, 8]
    assert [each.damage for each in await place.store.snapshots.of_run(run.run_id)] == [None, None]


class Outage:
    """A storage of snapshots that cannot be reached for so many tries."""

    def __init__(self, place: SnapshotPlace, tries: float) -> None:
        self.tries = tries
        self.looks = 0

    async def bring(self, key: str) -> None:
        self.looks += 1
        if self.looks <= self.tries:
            raise SnapshotsUnreachable("out of reach")


async def without_log(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch, tries: float
) -> tuple[Run, Outage]:
    """A run that only its snapshots, of operations 8 and 4, can bring back, and those are out of reach."""
    monkeypatch.setattr("gateway.dispatch.returning._AGAIN_S", 0.001)
    monkeypatch.setattr("gateway.dispatch.returning._LONGEST_PAUSE_S", 0.004)
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    await prune_inputs(place.store, Pace())
    outage = Outage(place, tries)
    monkeypatch.setattr(place.lane._files, "bring", outage.bring)
    place.leave_memory(run)
    return run, outage


async def test_an_outage_of_the_storage_is_waited_for_and_counts_as_nothing(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, outage = await without_log(place, monkeypatch, math.inf)
    outcome = asyncio.create_task(place.next(run))
    await until(lambda: outage.looks >= 20)  # two snapshots: ten tries, where three failures are the end
    (waiting,) = await place.store.futures.of_run_from(run.run_id, 9)
    standing = place.lane.standing(waiting)
    assert standing.paused and "out of reach" in standing.reason
    place.engine.damaged = {8: damage("weights"), 4: damage("moments")}
    outage.tries = (
        outage.looks + 1
    )  # the newest for once more: the other one is damaged, and that decides nothing
    await until(lambda: place.engine.restored[:1] == [4])
    place.engine.damaged = {}
    assert (await outcome).status is FutureStatus.DONE
    assert not place.lane.standing(waiting).paused


async def test_damage_counts_again_once_the_storage_is_back(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = await without_log(place, monkeypatch, 20)
    place.engine.damaged = {8: damage("weights"), 4: damage("moments")}
    failed = await place.next(run)
    assert (failed.status, failed.error_category) == (FutureStatus.FAILED, "server")
    assert place.engine.restored == 3 * [8, 4]


async def test_an_outage_does_not_keep_a_run_that_has_its_whole_log(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    monkeypatch.setattr(place.lane._files, "bring", Outage(place, math.inf).bring)
    place.leave_memory(run)
    assert (await place.next(run)).status is FutureStatus.DONE
    assert place.engine.replayed(run) == list(range(9))


class SlowStorage:
    """Snapshots lie elsewhere, and come when they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: SnapshotPlace) -> None:
        self.brought: list[str] = []
        self.put_away: list[str] = []
        self.arrived = asyncio.Event()
        monkeypatch.setattr(SnapshotFiles, "distant", True)
        for name in ("bring", "put_away"):
            monkeypatch.setattr(place.lane._files, name, getattr(self, f"_{name}"))

    async def _bring(self, key: str) -> None:
        self.brought.append(key)
        await self.arrived.wait()

    async def _put_away(self, key: str) -> None:
        self.put_away.append(key)


async def test_while_a_snapshot_is_brought_other_runs_go_on(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = await place.begin("alice"), await place.begin("bob")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    newest, _ = await place.store.snapshots.of_run(run.run_id)
    storage = SlowStorage(monkeypatch, place)
    place.leave_memory(run)
    coming = asyncio.create_task(place.next(run))
    await until(lambda: bool(storage.brought))
    assert (await place.next(other)).status is FutureStatus.DONE
    assert not coming.done() and place.engine.restored == []
    storage.arrived.set()
    assert (await coming).status is FutureStatus.DONE
    assert place.engine.restored == [8]
    assert storage.brought == storage.put_away == [newest.folder]


async def test_a_snapshot_that_is_damaged_is_brought_once_and_then_the_one_before(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    folders = [each.folder for each in await place.store.snapshots.of_run(run.run_id)]
    storage = SlowStorage(monkeypatch, place)
    storage.arrived.set()
    place.engine.damaged = {8: damage("weights")}
    place.leave_memory(run)
    assert (await place.next(run)).status is FutureStatus.DONE
    assert storage.brought == storage.put_away == folders


async def test_an_engine_that_is_lost_meanwhile_ends_the_bringing(
    place: SnapshotPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await place.begin("alice")
    await place.steps(run, 4)
    await place.registered(run, 8, 4)
    storage = SlowStorage(monkeypatch, place)
    place.leave_memory(run)
    coming = asyncio.create_task(place.next(run))
    await until(lambda: bool(storage.brought))
    [restoration] = place.lane._returning._restorations.values()
    assert restoration._fetching is not None
    place.lane.reset()
    await asyncio.wait([restoration._fetching], timeout=5)
    assert restoration._fetching.cancelled()
    coming.cancel()


# ---------------------------------------------------------------------------- checked


@pytest.mark.parametrize(("drifts", "told"), [(False, False), (True, True)])
async def test_a_replay_that_differs_is_told_and_the_run_goes_on(
    place: SnapshotPlace, caplog: pytest.LogCaptureFixture, drifts: bool, told: bool
) -> None:
    run = await place.begin("alice")

    def answers(call: Call) -> Performed:
        _, addresses, replay = call
        seq = addresses[0].seq_id
        loss = float(seq) + (0.5 if drifts and replay and seq >= 6 else 0.0)
        return Performed(0, [Outcome(summary={"loss": loss}, digest=str(loss).encode())])

    place.engine.script = answers
    await place.steps(run, 3)
    await place.next(run)
    await place.registered(run, 4)
    place.leave_memory(run)
    assert (await place.next(run)).status is FutureStatus.DONE
    found = await place.store.runs.get(run.run_id)
    assert found is not None
    if not told:
        assert found.replay_difference is None
        return
    difference = found.replay_difference or ""
    assert "optim_step 6: gradient norm 6.0 then, 6.5 now" in difference
    assert difference.rpartition(" ")[2] in caplog.text  # the id
    assert "2 operations gave other numbers" in caplog.text
    assert (await place.next(run)).status is FutureStatus.DONE
