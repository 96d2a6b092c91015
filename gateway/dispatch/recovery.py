"""Building a run again in an engine that does not have it: its newest intact snapshot, then its log from there on.

A snapshot that is damaged is reported, and the one before it is taken; without any, the log is applied from the first
operation. A mark of damage only says what happened: the snapshot is tried again after the intact ones, because what was
missing (a folder that was not mounted, say) may be back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque

from engines.messages import Outcome, RunAddress
from engines.operations import CHANGES_STATE, OperationKind
from gateway.dispatch.snapshots import Progress
from gateway.dispatch.verification import ReplayCheck
from gateway.engine_process import EngineProcess
from gateway.errors import StoreUnavailable
from gateway.snapshot_files import SnapshotFiles, SnapshotsUnreachable
from gateway.store import Store
from gateway.store.records import Future, Run, RunStatus, Snapshot

log = logging.getLogger(__name__)

_PAGE = 32
_STEP_S = 0.05
"""Seconds after which a step ends with the operation at hand, so that other runs get their turn."""


class RestoreFailed(Exception):
    """The run cannot be built again; the message says why and what its owner can do. `passing`: another try may
    succeed, for what was applied before did so."""

    def __init__(self, category: str, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.category = category
        self.passing = passing


class NoRoom(Exception):
    """The engine has no memory for the run, of `size` bytes, beside the others."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes are not free")
        self.size = size


class Restoration:
    """One run on its way into an engine: everything of its log that took effect below seq_id `before`.

    Every outcome below `before` must have been committed when the first step is taken. `progress` says where the run
    stands; when it is complete, `size` has its bytes, `seconds` how long that took.
    """

    def __init__(self, store: Store, files: SnapshotFiles, run_id: str, before: int) -> None:
        self._store = store
        self._files = files
        self._run_id = run_id
        self._before = before
        self._after: int | None = None
        self._page: deque[tuple[Future, bytes | None]] = deque()
        self._applied = 0
        self._check = ReplayCheck(run_id)
        self._fetching: asyncio.Task[None] | None = None
        self._fetched: str | None = None
        self.progress = Progress()
        self.size: int | None = None
        self.seconds = 0.0

    def fetch(self) -> asyncio.Task[None] | None:
        """Bring the files of the snapshot that will be tried first, while other runs have the engine; None when they
        need not be brought. Everything that may go wrong is met again by `step`."""
        if not self._files.distant:
            return None
        self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    def cancel(self) -> None:
        """Nobody wants the run in this engine any more."""
        if self._fetching is not None:
            self._fetching.cancel()

    async def step(self, engine: EngineProcess) -> bool:
        """Apply the next operations; whether the run is complete. Raises RestoreFailed, NoRoom and EngineLost, and
        SnapshotsUnreachable when only a snapshot that cannot be looked at now can bring the run back."""
        begun = time.monotonic()
        if self._after is None:
            self._after = await self._begin(engine)
        complete = await self._apply_until(engine, begun + _STEP_S)
        self.seconds += time.monotonic() - begun
        return complete

    async def _apply_until(self, engine: EngineProcess, deadline: float) -> bool:
        while self._page or await self._read_page():
            await self._apply_next(engine)
            if time.monotonic() > deadline:
                return False
        begun = (
            f"the snapshot after operation {self.progress.kept}" if self.progress.kept else "its log alone"
        )
        if not self.progress.kept and not self._applied:
            raise RestoreFailed(
                "server", f"run {self._run_id} has no first operation in its log; create a new run"
            )
        self._check.close()
        log.info(
            "run %s is restored in engine %s from %s: %d operations applied again",
            self._run_id,
            engine.config.name,
            begun,
            self._applied,
        )
        return True

    # ------------------------------------------------------------------ where to begin

    async def _begin(self, engine: EngineProcess) -> int:
        """Restore a snapshot if there is one; gives the number of the operation that the log goes on behind."""
        run = await self._store.runs.get(self._run_id)
        if run is None or run.status is RunStatus.FAILED:
            raise RestoreFailed("user", f"run {self._run_id} could not be created; create a new one")
        problems = []
        outage: SnapshotsUnreachable | None = None
        for snapshot in await self._candidates():
            try:
                problem = await self._restore(engine, snapshot)
            except SnapshotsUnreachable as error:
                log.warning("snapshot %s of run %s: %s", snapshot.folder, snapshot.run_id, error)
                outage = error
                continue
            if problem is None:
                self.progress.changed = self.progress.kept = snapshot.seq_id
                self.progress.boundary = await self._is_boundary(snapshot)
                return snapshot.seq_id
            problems.append(f"that after operation {snapshot.seq_id}: {problem}")
        if outage is not None and run.pruned_seq:
            raise outage
        self._require_whole_log(run, problems)
        return -1

    async def _is_boundary(self, snapshot: Snapshot) -> bool:
        """Whether it has no pending gradient."""
        number, kinds = snapshot.seq_id, sorted(CHANGES_STATE)
        [last] = await self._store.futures.applied_to_run(self._run_id, number - 1, number + 1, kinds, 1)
        return last.kind != "forward_backward"

    async def _candidates(self) -> list[Snapshot]:
        """Those known to be damaged last, else the newest first."""
        found = await self._store.snapshots.of_run(self._run_id)
        behind = [snapshot for snapshot in found if snapshot.seq_id < self._before]
        return sorted(behind, key=lambda each: each.damage is not None)

    async def _fetch(self) -> None:
        begun = time.monotonic()
        with contextlib.suppress(SnapshotsUnreachable, StoreUnavailable):
            async with self._files.fetches:
                for snapshot in (await self._candidates())[:1]:
                    await self._files.bring(snapshot.folder)
                    self._fetched = snapshot.folder
        self.seconds += time.monotonic() - begun

    def _require_whole_log(self, run: Run, problems: list[str]) -> None:
        if run.pruned_seq:
            why = "; ".join(problems) or "there is none"
            raise RestoreFailed(
                "server",
                f"run {run.run_id} cannot be restored: no snapshot of it can be used ({why}), and the inputs of its "
                f"operations up to {run.pruned_seq}, which one contained, have been removed",
                passing=bool(problems),
            )

    async def _restore(self, engine: EngineProcess, snapshot: Snapshot) -> str | None:
        """Have the engine restore a snapshot; why it could not. Damage is reported, and recorded with the snapshot.
        Raises SnapshotsUnreachable, which says nothing about the snapshot."""
        address = RunAddress(snapshot.run_id, snapshot.seq_id)
        create_run = await self._store.futures.input_at(snapshot.run_id, 0)
        if create_run is None:
            return "the input of its first operation is missing"
        try:
            if snapshot.folder != self._fetched:
                await self._files.bring(snapshot.folder)
            performed = await engine.restore(address, snapshot.folder, snapshot.checksums, create_run)
        finally:
            self._fetched = None
            await self._files.put_away(snapshot.folder)
        if performed.no_room:
            raise NoRoom(performed.no_room[snapshot.run_id])
        failure = performed.outcomes[0].failure
        self.size = size_of(performed.outcomes[0])
        if failure is not None and failure.category == "server":
            raise RestoreFailed(
                "server", f"the run could not be restored from its snapshot: {failure.message}", passing=True
            )
        damage = None if failure is None else failure.message
        if damage != snapshot.damage:
            await self._store.snapshots.set_damage(snapshot.folder, damage)
        if damage is not None:
            log.error(
                "the snapshot of run %s after operation %d is damaged: %s",
                snapshot.run_id,
                snapshot.seq_id,
                damage,
            )
        return damage

    # ------------------------------------------------------------------ the log from there on

    async def _read_page(self) -> bool:
        kinds = sorted(CHANGES_STATE)
        after = -1 if self._after is None else self._after
        page = await self._store.futures.applied_to_run(self._run_id, after, self._before, kinds, _PAGE)
        if page:
            inputs = await self._store.futures.inputs(future.request_id for future in page)
            self._page.extend((future, inputs.get(future.request_id)) for future in page)
            self._after = page[-1].seq_id
        return bool(page)

    async def _apply_next(self, engine: EngineProcess) -> None:
        future, body = self._page.popleft()
        if body is None:
            raise RestoreFailed(
                "server", f"the input of {future.request_id} is missing; the run cannot be restored"
            )
        kind: OperationKind = future.kind  # type: ignore[assignment]
        address = RunAddress(future.run_id or "", future.seq_id)
        performed, _ = await engine.perform(kind, [address], [body], replay=True)
        if performed.no_room:
            raise NoRoom(performed.no_room[address.run_id])
        await self._judge(future, performed.outcomes[0])
        if kind == "create_run":
            self.size = size_of(performed.outcomes[0])
        self._applied += 1
        self.progress.apply(future.kind, future.seq_id)

    async def _judge(self, future: Future, outcome: Outcome) -> None:
        """Compare with what was recorded. The run goes on with other numbers, but nobody is left in the dark."""
        failure = outcome.failure
        if failure is not None:
            raise RestoreFailed(
                "server",
                f"the run could not be restored: {future.kind} {future.seq_id} succeeded before and now failed: "
                f"{failure.message}",
                passing=failure.category == "server",
            )
        difference = self._check.look(future, outcome)
        if difference is not None:
            await self._store.runs.record_difference(self._run_id, difference)


def size_of(outcome: Outcome) -> int | None:
    """Bytes of a run that has been created, where the engine tells them."""
    size = outcome.summary.get("bytes")
    return None if size is None else int(size)
