"""When snapshots of an engine's runs are taken, and what becomes of them: taken → kept → registered.

A run goes on while its snapshot is written. One that fails costs nothing but a longer replay: no input is given up for
it. Snapshots are taken every `snapshot_steps` optimizer steps, at the next step after `snapshot_s` seconds, when
somebody asks for one, and of a run that leaves memory, which need not wait for it. A run that takes no step has one
with its pending gradient after so many passes, or its inputs would be kept for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from engines.messages import RunAddress, SnapshotTaken
from engines.operations import CHANGES_STATE
from gateway.engine_process import EngineProcess
from gateway.errors import EngineLost, StoreUnavailable
from gateway.settings import Settings
from gateway.snapshot_files import SnapshotFiles, SnapshotsUnreachable
from gateway.store import Store
from gateway.store.records import Future, Outcome
from gateway.store.snapshots import Registration

log = logging.getLogger(__name__)

_AT_A_TIME = 2
"""Snapshots of one engine that are under way: each is a copy of a run in memory."""
_MOST = 4
"""The same, with those of runs that leave: no more leave until one is there."""
_STEPLESS = 64
"""Operations that change a run, since its last step and snapshot, after which one is taken without a step."""
_PATIENCE_S = 30.0
"""Seconds after which a run that has left comes back from an older snapshot, though its last one is not there yet."""


@dataclass(slots=True)
class Progress:
    """How far a run in the engine's memory has got, and its snapshots behind it.

    `changed` is the last operation that has changed it, `kept` the one that its newest snapshot contains (its creation
    needs none), `taken` the one that the newest contains that was begun, `steps` the optimizer steps since then, at
    `since`, `stepless` what else has changed it since then and since the last step. `boundary`: no gradients are
    pending. `left` is there when the run has left memory, and done when its snapshots are.
    """

    changed: int = 0
    kept: int = 0
    taken: int = 0
    steps: int = 0
    stepless: int = 0
    boundary: bool = True
    since: float = 0.0
    moving: bool = False
    taking: int = 0
    wanted: int = 0
    asked: asyncio.Future[bool] | None = None
    left: asyncio.Future[None] | None = None

    def apply(self, kind: str, seq_id: int) -> None:
        """An operation has succeeded."""
        if kind in CHANGES_STATE:
            self.changed = seq_id
            self.boundary = kind != "forward_backward"
            self.steps += kind == "optim_step"
            self.stepless = 0 if kind in ("create_run", "optim_step") else self.stepless + 1


class Snapshots:
    """Those of the runs in one engine's memory."""

    def __init__(
        self, store: Store, settings: Settings, files: SnapshotFiles, on_finished: Callable[[], None]
    ) -> None:
        self._on_finished = on_finished
        self._store = store
        self._settings = settings
        self._files = files
        self._engine: EngineProcess | None = None
        self._runs: dict[str, Progress] = {}
        self._left: dict[str, Progress] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._database: bytes | None = None
        self.problems: dict[str, str] = {}
        self.writing_s = 0.0
        """Seconds that writing the newest snapshot took."""

    def serve(self, engine: EngineProcess) -> None:
        """The engine whose runs these are from now on."""
        self._engine = engine

    def reset(self) -> None:
        """Forget everything. What is being written and has not been registered is removed as nobody's later."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        for run_id in list(self._runs):
            self.forget(run_id)
        self._left.clear()
        self._under_way = 0
        self._engine = None

    # ------------------------------------------------------------------ what the lane tells

    def begin(self, run_id: str, progress: Progress) -> None:
        """A run has come into the engine's memory."""
        progress.since = time.monotonic()
        self._runs[run_id] = progress

    def forget(self, run_id: str) -> None:
        """A run is not in the engine's memory any more."""
        progress = self._runs.pop(run_id, None)
        self.problems.pop(run_id, None)
        if progress is not None:
            _answer(progress, False)

    async def leave(self, run_id: str) -> None:
        """A run is about to leave the engine's memory, and stands between two operations: what no snapshot has of it
        is copied now, before whatever is sent to the engine next, and written later.

        Nothing is copied while gradients are pending. Raises EngineLost.
        """
        database = await self._key()
        progress = self._runs.get(run_id)
        if (
            progress is not None
            and progress.boundary
            and progress.changed > max(progress.kept, progress.taken)
        ):
            await self._begin(run_id, progress, database)
        if progress is None or not progress.taking:
            self.forget(run_id)
            return
        self._runs.pop(run_id, None)
        self.problems.pop(run_id, None)
        progress.left = asyncio.get_running_loop().create_future()
        self._left[run_id] = progress
        asyncio.get_running_loop().call_later(_PATIENCE_S, self._has_left, run_id, progress)

    def left(self, run_id: str) -> asyncio.Future[None] | None:
        """None when a run may come back; else it had better wait for this: the snapshot that it left with."""
        progress = self._left.get(run_id)
        return None if progress is None else progress.left

    @property
    def crowded(self) -> bool:
        """Whether so much is being written that no run should leave now."""
        return self._under_way >= _MOST

    def moving(self, futures: Iterable[Future]) -> None:
        """Operations are about to be sent to the engine: their runs stand nowhere until they are done."""
        for future in futures:
            if (progress := self._runs.get(future.run_id or "")) is not None:
                progress.moving = True

    async def performed(self, outcomes: Iterable[Outcome]) -> None:
        """Their outcomes are on their way to the database. Whatever is due is begun, before the next call is sent."""
        for outcome in outcomes:
            future, run_id = outcome.future, outcome.future.run_id or ""
            if future.kind == "create_run" and not outcome.failed:
                self.begin(run_id, Progress())
            if (progress := self._runs.get(run_id)) is None:
                continue
            progress.moving = False
            if not outcome.failed:
                progress.apply(future.kind, future.seq_id)
            await self._begin_if_due(run_id, progress)

    # ------------------------------------------------------------------ what others ask

    def covered(self, run_id: str) -> bool:
        """Whether the newest snapshot has everything of a run that is in memory."""
        progress = self._runs.get(run_id)
        return progress is not None and progress.changed <= progress.kept

    def request(self, run_id: str) -> asyncio.Future[bool]:
        """Take a snapshot of a run now, or at its next boundary.

        True once one is registered that has everything until now; False when that failed, or the run has left memory
        first. While gradients are pending and no step comes, neither happens.
        """
        progress = self._runs.get(run_id)
        if progress is None or progress.changed <= progress.kept:
            answer = asyncio.get_running_loop().create_future()
            answer.set_result(progress is not None)
            return answer
        if progress.asked is None:
            progress.asked = asyncio.get_running_loop().create_future()
            self._spawn(self._begin_if_due(run_id, progress))
        progress.wanted = progress.changed
        return asyncio.shield(progress.asked)

    async def take_all(self) -> None:
        """Take one of every run that stands at a boundary and has none of where it stands; returns when those are
        registered or have failed, and those of runs that have left. For an engine that is about to end: the next one
        begins there."""
        standing = [run_id for run_id, progress in self._runs.items() if progress.boundary]
        leaving = [progress.left for progress in self._left.values() if progress.left is not None]
        await asyncio.gather(*map(self.request, standing), *map(asyncio.shield, leaving))

    # ------------------------------------------------------------------ taken → kept → registered

    def _due(self, progress: Progress) -> bool:
        if progress.moving or progress.taking or progress.changed <= progress.kept:
            return False
        steps, seconds = self._settings.snapshot_steps, self._settings.snapshot_s
        if progress.stepless >= _STEPLESS and (steps > 0 or seconds > 0):
            return True
        if not progress.boundary:
            return False
        if progress.asked is not None:
            return True
        late = time.monotonic() - progress.since >= seconds
        return 0 < steps <= progress.steps or (seconds > 0 and progress.steps > 0 and late)

    async def _begin_if_due(self, run_id: str, progress: Progress) -> None:
        if not self._due(progress):
            return
        database = await self._key()
        if self._engine is None or self._under_way >= _AT_A_TIME or not self._due(progress):
            return
        with contextlib.suppress(
            EngineLost
        ):  # whoever feeds it notices too, and everything here is forgotten
            await self._begin(run_id, progress, database)

    async def _key(self) -> bytes:
        """What identifies the database."""
        if self._database is None:
            self._database = await self._store.secrets.get("storage")
        return self._database

    async def _begin(self, run_id: str, progress: Progress, database: bytes) -> None:
        """Have the engine copy the run. Raises EngineLost."""
        engine = self._engine
        assert engine is not None
        self._under_way += 1
        progress.taking += 1
        progress.taken = progress.changed
        progress.steps, progress.stepless, progress.since = 0, 0, time.monotonic()
        place, key = RunAddress(run_id, progress.changed), self._files.new_key(database)
        answer = await engine.begin_snapshot(place, key)
        self._spawn(self._finish(engine, place, key, progress, answer))

    async def _finish(
        self,
        engine: EngineProcess,
        place: RunAddress,
        key: str,
        progress: Progress,
        answer: asyncio.Future[SnapshotTaken],
    ) -> None:
        problem = await self._problem(engine, place, key, answer)
        progress.taking -= 1
        self._under_way -= 1
        if problem is None:
            progress.kept = max(progress.kept, place.seq_id)
            self.problems.pop(place.run_id, None)
        else:
            log.warning("run %s has no snapshot after operation %d: %s", place.run_id, place.seq_id, problem)
            progress.taken = progress.kept
            if self._runs.get(place.run_id) is progress:
                self.problems[place.run_id] = problem
        if place.seq_id >= progress.wanted:
            _answer(progress, problem is None)
        if progress.left is not None and not progress.taking:
            self._has_left(place.run_id, progress)
        self._on_finished()
        for run_id, other in list(self._runs.items()):
            await self._begin_if_due(run_id, other)

    def _has_left(self, run_id: str, progress: Progress) -> None:
        if self._left.get(run_id) is progress:
            del self._left[run_id]
        if progress.left is not None and not progress.left.done():
            progress.left.set_result(None)
        _answer(progress, False)

    async def _problem(
        self, engine: EngineProcess, place: RunAddress, key: str, answer: asyncio.Future[SnapshotTaken]
    ) -> str | None:
        """Keep and register a snapshot that the engine is writing; why there is none, if there is none."""
        try:
            taken = await answer
            if taken.failure is not None:
                return taken.failure.message
            begun = time.monotonic()
            await self._files.keep(key)
            self.writing_s = taken.seconds + time.monotonic() - begun
            registered = await self._store.snapshots.register(
                Registration(
                    place.run_id,
                    place.seq_id,
                    key,
                    taken.checksums,
                    taken.size_bytes,
                    engine.config.name,
                    engine.config.epoch,
                )
            )
        except SnapshotsUnreachable as error:
            return f"its files cannot be kept: {error}"
        except (EngineLost, StoreUnavailable) as error:
            return str(error)
        if registered:
            return None
        await self._files.remove(key)
        return "this gateway does not own its engine any more"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a snapshot was not taken: unexpected error", exc_info=error)


def _answer(progress: Progress, kept: bool) -> None:
    """Tell who has asked for a snapshot."""
    if progress.asked is not None and not progress.asked.done():
        progress.asked.set_result(kept)
    progress.asked = None
