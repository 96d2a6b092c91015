"""The lane of the runs over a real store and an engine that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engines.messages import Failure, Outcome, Performed, RunAddress
from gateway.dispatch.blame import Blame
from gateway.dispatch.quarantine import Quarantine
from gateway.dispatch.training import TrainingLane
from gateway.engine_process import EngineProcess
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Submission
from gateway.store.records import Future, FutureStatus, Run, Settled
from tests.store.conftest import a_run, a_session, an_operation

Call = tuple[str, tuple[RunAddress, ...], bool]
"""Kind, runs with their numbers, whether it is a replay."""


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


class ScriptedEngine:
    """Performs everything at once, unless `script` has another answer to a call."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(epoch=1, name="e", base_model="m")
        self.info = SimpleNamespace(run_memory_bytes=0, deterministic=False, pass_tokens=4096)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.calls: list[Call] = []
        self.dropped: list[str] = []
        self.somebody_dropped = asyncio.Event()
        self.script: Callable[[Call], Performed | None] = lambda call: None
        self.pause_s = 0.0

    async def perform(
        self, kind: str, runs: Sequence[RunAddress], payloads: Sequence[bytes], *, replay: bool = False
    ) -> tuple[Performed, list[bytes]]:
        call = (kind, tuple(runs), replay)
        self.calls.append(call)
        await asyncio.sleep(self.pause_s)
        answer = self.script(call) or Performed(0, [Outcome() for _ in runs])
        return answer, [b"result" for outcome in answer.outcomes if outcome.failure is None]

    async def drop_run(self, run_id: str) -> None:
        self.dropped.append(run_id)
        self.somebody_dropped.set()

    def applied(self, run: Run) -> list[int]:
        """Numbers of a run in the order in which they reached the engine."""
        return [
            seq for _, runs, _ in self.calls for run_id, seq in map(astuple, runs) if run_id == run.run_id
        ]


def astuple(address: RunAddress) -> tuple[str, int]:
    return address.run_id, address.seq_id


def broken(runs: int, lost: list[str], category: str = "server") -> Performed:
    """What a call that raised something answers."""
    failure = Failure(cast(Any, category), "the engine broke")
    return Performed(0, [Outcome(failure) for _ in range(runs)], lost)


class Place:
    """A lane that is fed, and what comes out of it."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.engine = ScriptedEngine()
        self.settled: dict[str, Settled] = {}
        self.lane = TrainingLane(store, settings, self._heard, Blame(2))
        self._arrived = asyncio.Event()

    def _heard(self, settled: Settled | None) -> None:
        assert settled is not None
        self.settled[settled.future.request_id] = settled
        self._arrived.set()

    async def begin(self, owner: str) -> Run:
        session = await self.store.sessions.create(a_session(owner=owner))
        run = a_run(session)
        await self.submit(run, 0, "create_run", run)
        return run

    async def submit(
        self,
        run: Run,
        seq: int,
        kind: str = "forward_backward",
        new: Run | None = None,
        body: bytes = b"input",
    ) -> Future:
        future = an_operation(run, seq, kind)
        submission = Submission(future, body, new)
        await self.store.futures.submit(submission, lambda _: self.lane.accept(future, body))
        return future

    async def outcome(self, future: Future) -> Future:
        async with asyncio.timeout(10):
            while future.request_id not in self.settled:
                self._arrived.clear()
                await self._arrived.wait()
        return self.settled[future.request_id].future


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    place = Place(store, Settings(data_dir=tmp_path))
    feeding = asyncio.create_task(place.lane.feed(cast(EngineProcess, place.engine), Quarantine()))
    yield place
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding
    await store.close()


@pytest.fixture
def slow_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database whose commits take longer than the engine's work, as one across a network may."""
    write = Database._commit_group

    async def slow(database: Database, group: Any) -> None:
        await asyncio.sleep(0.03)
        await write(database, group)

    monkeypatch.setattr(Database, "_commit_group", slow)


@pytest.mark.usefixtures("slow_commits")
async def test_a_restored_run_has_every_operation_whose_outcome_is_on_its_way(place: Place) -> None:
    run = await place.begin("alice")

    def fails_at_three(call: Call) -> Performed | None:
        _, (address, *_), replay = call
        return broken(1, [run.run_id]) if address.seq_id == 3 and not replay else None

    place.engine.script = fails_at_three
    kinds = {1: "forward_backward", 2: "forward_backward", 3: "forward_backward", 4: "optim_step"}
    *futures, step = await asyncio.gather(*(place.submit(run, seq, kind) for seq, kind in kinds.items()))
    assert (await place.outcome(step)).status is FutureStatus.DONE
    assert (await place.outcome(futures[2])).error_category == "server"
    assert place.engine.applied(run) == [0, 1, 2, 3, 0, 1, 2, 4]
    assert [replay for _, _, replay in place.engine.calls[4:7]] == [True] * 3


async def test_a_long_restoration_lets_others_have_their_turns(place: Place) -> None:
    long, short = await place.begin("alice"), await place.begin("bob")
    for seq in range(1, 30):
        await place.outcome(await place.submit(long, seq))
    place.lane.residency.reset()
    place.engine.calls.clear()
    place.engine.pause_s = 0.02
    ours = await place.submit(long, 30)
    theirs = await place.submit(short, 1)
    await place.outcome(theirs)
    assert ours.request_id not in place.settled
    assert len(place.engine.applied(long)) < 15
    await place.outcome(ours)
    assert place.engine.applied(long) == [*range(31)]
    assert place.engine.applied(short) == [0, 1]


async def test_a_restoration_that_fails_for_a_passing_reason_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.returning._AGAIN_S", 0.01)
    run = await place.begin("alice")
    await place.outcome(await place.submit(run, 1))
    place.lane.residency.reset()
    failures = iter([broken(1, []), None, broken(1, [])])
    place.engine.script = lambda call: next(failures, None) if call[2] else None
    assert (await place.outcome(await place.submit(run, 2))).status is FutureStatus.DONE
    assert place.engine.applied(run)[2:] == [0, 0, 1, 0, 1, 2]


async def test_a_restoration_that_keeps_failing_fails_the_operation_that_needs_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.dispatch.returning._AGAIN_S", 0.01)
    run = await place.begin("alice")
    await place.outcome(await place.submit(run, 1))
    place.lane.residency.reset()
    place.engine.script = lambda call: broken(1, []) if call[2] else None
    failed = await place.outcome(await place.submit(run, 2))
    assert (failed.status, failed.error_category) == (FutureStatus.FAILED, "server")
    assert "could not be restored" in (failed.error or "")
    place.engine.script = lambda call: None
    assert (await place.outcome(await place.submit(run, 3))).status is FutureStatus.DONE


async def test_a_replay_that_is_refused_is_not_tried_again(place: Place) -> None:
    run = await place.begin("alice")
    await place.outcome(await place.submit(run, 1))
    place.lane.residency.reset()
    place.engine.calls.clear()
    place.engine.script = lambda call: broken(1, [], "user") if call[2] else None
    assert (await place.outcome(await place.submit(run, 2))).status is FutureStatus.FAILED
    assert place.engine.applied(run) == [0]


async def test_a_call_for_several_runs_that_breaks_is_repeated_for_each_alone(place: Place) -> None:
    runs = [await place.begin(owner) for owner in ("alice", "bob")]
    for run in runs:
        await place.outcome(await place.submit(run, 1))
    place.engine.calls.clear()
    place.engine.script = lambda call: broken(2, [a.run_id for a in call[1]]) if len(call[1]) > 1 else None
    place.engine.pause_s = 0.02  # both steps wait by the time that the first pass is done
    holds = await place.submit(runs[0], 2)
    steps = [await place.submit(runs[0], 3, "optim_step"), await place.submit(runs[1], 2, "optim_step")]
    for future in (holds, *steps):
        assert (await place.outcome(future)).status is FutureStatus.DONE
    sizes = [len(addresses) for kind, addresses, _ in place.engine.calls if kind == "optim_step"]
    assert sizes == [2, 1, 1]


async def test_what_was_applied_beside_a_run_that_was_lost_is_not_sent_again(place: Place) -> None:
    """An operation that an engine gets twice is refused the second time, though it took effect."""
    lost, other = [await place.begin(owner) for owner in ("alice", "bob")]
    for run in (lost, other):
        await place.outcome(await place.submit(run, 1))

    def script(call: Call) -> Performed | None:
        if len(call[1]) == 1:
            return None
        answers = {lost.run_id: Outcome(Failure("server", "not in memory")), other.run_id: Outcome()}
        return Performed(0, [answers[address.run_id] for address in call[1]], [lost.run_id])

    place.engine.script = script
    place.engine.pause_s = 0.02  # both steps wait by the time that the pass is done
    holds = await place.submit(lost, 2)
    steps = [await place.submit(lost, 3, "optim_step"), await place.submit(other, 2, "optim_step")]
    for future in (holds, *steps):
        assert (await place.outcome(future)).status is FutureStatus.DONE
    calls = [
        addresses for kind, addresses, replay in place.engine.calls if kind == "optim_step" and not replay
    ]
    assert [len(addresses) for addresses in calls] == [2, 1]
    assert calls[1][0].run_id == lost.run_id


async def test_a_dropped_run_is_freed_when_nothing_of_it_waits(place: Place) -> None:
    run = await place.begin("alice")
    await place.outcome(await place.submit(run, 1))
    place.engine.pause_s = 0.02
    waiting = [await place.submit(run, seq) for seq in (2, 3, 4)]
    place.lane.drop(run.run_id)
    for future in waiting:
        assert (await place.outcome(future)).status is FutureStatus.DONE
    await asyncio.wait_for(place.engine.somebody_dropped.wait(), 5)
    assert place.engine.dropped == [run.run_id]
    assert place.engine.applied(run) == [0, 1, 2, 3, 4]
    assert not place.lane.residency.holds(run.run_id)


async def test_runs_that_have_left_leave_nothing_behind(place: Place) -> None:
    for _ in range(3):
        run = await place.begin("alice")
        await place.outcome(await place.submit(run, 1))
        place.lane.drop(run.run_id)
        await asyncio.wait_for(place.engine.somebody_dropped.wait(), 10)
        place.engine.somebody_dropped.clear()
    await eventually(lambda: not place.lane._queue.runs)
    failed = await place.store.sessions.create(a_session(owner="bob"))
    place.engine.script = lambda call: broken(1, [a.run_id for a in call[1]])
    run = a_run(failed)
    assert (await place.outcome(await place.submit(run, 0, "create_run", run))).status is FutureStatus.FAILED
    await eventually(lambda: not place.lane._queue.runs)


async def test_a_run_that_was_forgotten_goes_on_behind_outcomes_that_are_on_their_way(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, run = await place.begin("bob"), await place.begin("alice")
    place.lane.drop(other.run_id)  # the first that leaves reads a secret, which takes a commit
    await asyncio.wait_for(place.engine.somebody_dropped.wait(), 10)
    place.engine.somebody_dropped.clear()
    commit = Database._commit_group

    async def slow(database: Database, group: Any) -> None:
        await asyncio.sleep(0.3)
        await commit(database, group)

    monkeypatch.setattr(Database, "_commit_group", slow)
    place.engine.pause_s = 0.1
    first = await place.submit(run, 1)
    second = asyncio.create_task(place.submit(run, 2))  # is handed over before the outcome of the first
    place.lane.drop(run.run_id)
    await asyncio.wait_for(place.engine.somebody_dropped.wait(), 10)
    assert first.request_id not in place.settled
    assert not second.done()
    for future in (first, await second):
        assert (await place.outcome(future)).status is FutureStatus.DONE
    calls = [
        (runs[0].seq_id, replay) for _, runs, replay in place.engine.calls if runs[0].run_id == run.run_id
    ]
    assert calls == [(0, False), (1, False), (0, True), (1, True), (2, False)]


async def test_a_death_in_a_restoration_is_put_down_to_that_run_and_to_no_operation(place: Place) -> None:
    runs = [await place.begin(owner) for owner in ("alice", "bob")]
    for run in runs:
        await place.outcome(await place.submit(run, 1))
    place.lane.residency.reset()
    seen: list[tuple[str | None, tuple[str, ...]]] = []

    def look(call: Call) -> None:
        if call[2]:
            seen.append((place.lane.restoring, place.lane.in_engine))

    place.engine.script = look
    steps = await asyncio.gather(*(place.submit(run, 2, "optim_step") for run in runs))
    for step in steps:
        await place.outcome(step)
    assert set(seen) == {(run.run_id, ()) for run in runs}
    assert place.lane.restoring is None


@pytest.mark.parametrize("large", [False, True])
async def test_one_step_waits_for_the_call_in_flight_and_no_other_beside_a_thousand(
    place: Place, large: bool
) -> None:
    """Also when it is so large that the other owner's steps are many times smaller."""
    many, one = [await place.begin("alice") for _ in range(10)], await place.begin("bob")
    await place.outcome(await place.submit(one, 1))
    place.engine.pause_s = 0.05
    hers = await asyncio.gather(*(place.submit(run, seq) for run in many for seq in range(1, 101)))
    his = await place.submit(one, 2, body=bytes(2**18) if large else b"input")
    begun = len(place.engine.calls)
    await place.outcome(his)
    [number] = [i for i, call in enumerate(place.engine.calls) if RunAddress(one.run_id, 2) in call[1]]
    assert number <= begun  # the next one after those that had begun
    assert sum(future.request_id in place.settled for future in hers) < 500
