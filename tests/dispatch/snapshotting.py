"""A lane over a real store, with an engine that takes and restores snapshots as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

from engines.messages import Failure, Outcome, Performed, RunAddress, SnapshotTaken
from gateway.dispatch.quarantine import Quarantine
from gateway.engine_process import EngineProcess
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.leases import LeaseRequest
from gateway.store.records import Future, FutureStatus, Run
from tests.dispatch.test_training import Place, ScriptedEngine


class SnapshottingEngine(ScriptedEngine):
    """Snapshots are there at once, unless `holds`; what is in `damaged` cannot be restored."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal: Failure | None = None
        self.holds = False
        self.writing_s = 0.0
        self.held: list[asyncio.Future[SnapshotTaken]] = []
        self.damaged: dict[int, Failure] = {}
        self.restored: list[int] = []
        self.bodies: list[bytes] = []

    async def begin_snapshot(self, run: RunAddress, folder: str) -> asyncio.Future[SnapshotTaken]:
        self.calls.append(("snapshot", (run,), False))
        answer: asyncio.Future[SnapshotTaken] = asyncio.get_running_loop().create_future()
        self.held.append(answer)
        if not self.holds:
            self.release()
        return answer

    def release(self) -> None:
        """Everything that is being written is there now."""
        for answer in self.held:
            answer.set_result(SnapshotTaken(0, self.refusal, 3, {"file": "0f"}, self.writing_s))
        self.held.clear()

    async def restore(
        self, run: RunAddress, folder: str, checksums: dict[str, str], create_run: bytes
    ) -> Performed:
        assert checksums == {"file": "0f"}
        self.restored.append(run.seq_id)
        self.bodies.append(create_run)
        return Performed(0, [Outcome(failure=self.damaged.get(run.seq_id))])

    def snapshots(self, run: Run) -> list[int]:
        """The operations after which snapshots of a run were begun."""
        return [
            runs[0].seq_id
            for kind, runs, _ in self.calls
            if kind == "snapshot" and runs[0].run_id == run.run_id
        ]

    def replayed(self, run: Run) -> list[int]:
        return [runs[0].seq_id for _, runs, replay in self.calls if replay and runs[0].run_id == run.run_id]


SIZE = 100
"""Bytes of a run in a SmallEngine."""


class SmallEngine(SnapshottingEngine):
    """Has room for so many runs, keeps what was applied to each, and refuses what a real one refuses."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.info.run_memory_bytes = places * SIZE
        self.places = places
        self.runs: dict[str, list[int]] = {}
        self.most = 0
        self.history: dict[str, list[list[int]]] = defaultdict(list)
        self.written: dict[str, list[int]] = {}

    async def perform(
        self, kind: str, runs: Sequence[RunAddress], payloads: Sequence[bytes], *, replay: bool = False
    ) -> tuple[Performed, list[bytes]]:
        self.calls.append((kind, tuple(runs), replay))
        await asyncio.sleep(self.pause_s)
        outcomes, no_room = [], {}
        for address in runs:
            run_id = address.run_id
            if kind == "create_run" and not self._has_room(run_id):
                no_room[run_id] = SIZE
                outcomes.append(Outcome(Failure("server", "no room")))
                continue
            if kind == "create_run":
                self._begin(run_id, [])
            assert run_id in self.runs, f"operation {address.seq_id} of a run that is not there"
            self.runs[run_id].append(address.seq_id)
            outcomes.append(Outcome(summary={"bytes": float(SIZE)} if kind == "create_run" else {}))
        return Performed(0, outcomes, [], no_room), [b"r" for each in outcomes if each.failure is None]

    async def drop_run(self, run_id: str) -> None:
        self.runs.pop(run_id, None)
        await super().drop_run(run_id)

    async def begin_snapshot(self, run: RunAddress, folder: str) -> asyncio.Future[SnapshotTaken]:
        applied = self.runs[run.run_id]
        assert applied[-1] == run.seq_id
        self.written[folder] = [*applied]
        return await super().begin_snapshot(run, folder)

    async def restore(
        self, run: RunAddress, folder: str, checksums: dict[str, str], create_run: bytes
    ) -> Performed:
        if not self._has_room(run.run_id):
            return Performed(0, [Outcome(Failure("server", "no room"))], no_room={run.run_id: SIZE})
        self._begin(run.run_id, [*self.written[folder]])
        await super().restore(run, folder, checksums, create_run)
        return Performed(0, [Outcome(summary={"bytes": float(SIZE)})])

    def _has_room(self, run_id: str) -> bool:
        return run_id in self.runs or len(self.runs) < self.places

    def _begin(self, run_id: str, applied: list[int]) -> None:
        self.runs[run_id] = applied
        self.history[run_id].append(applied)
        self.most = max(self.most, len(self.runs))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true within five seconds")


class SnapshotPlace(Place):
    """The lane of engine `e` in its first epoch."""

    def __init__(self, store: Store, settings: Settings) -> None:
        super().__init__(store, settings)
        self.engine: SnapshottingEngine = SnapshottingEngine()
        self.numbers: dict[str, int] = {}

    async def begin(self, owner: str) -> Run:
        run = await super().begin(owner)
        await until(lambda: self.lane.residency.holds(run.run_id))
        return run

    async def steps(self, run: Run, count: int) -> Future:
        """So many further steps of one pass each, one after the other; the last one."""
        last: Future | None = None
        for _ in range(2 * count):
            last = await self.next(run)
        assert last is not None and last.status is FutureStatus.DONE
        return last

    async def next(self, run: Run) -> Future:
        """The outcome of the run's next operation: passes are odd, steps even."""
        number = self.numbers[run.run_id] = self.numbers.get(run.run_id, 0) + 1
        return await self.outcome(
            await self.submit(run, number, "forward_backward" if number % 2 else "optim_step")
        )

    async def registered(self, run: Run, *numbers: int) -> None:
        """Wait until the run's snapshots are these, newest first."""
        for _ in range(1000):
            if await self.kept(run) == list(numbers):
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{await self.kept(run)} instead of {numbers}")

    async def kept(self, run: Run) -> list[int]:
        return [snapshot.seq_id for snapshot in await self.store.snapshots.of_run(run.run_id)]

    def leave_memory(self, run: Run) -> None:
        """As if the engine had been started anew."""
        self.lane.residency.leave(run.run_id)
        self.lane.snapshots.forget(run.run_id)
        self.engine.calls.clear()


@contextlib.asynccontextmanager
async def fed(
    tmp_path: Path, engine: SnapshottingEngine | None = None, **settings: Any
) -> AsyncIterator[SnapshotPlace]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    assert await store.leases.take(LeaseRequest("e", "us", 600)) == 1
    place = SnapshotPlace(store, Settings(data_dir=tmp_path, **settings))
    place.engine = engine or place.engine
    feeding = asyncio.create_task(place.lane.feed(cast(EngineProcess, place.engine), Quarantine()))
    yield place
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding
    place.lane.snapshots.reset()
    await store.close()
