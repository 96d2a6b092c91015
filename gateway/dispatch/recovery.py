"""Building a run again in an engine that does not have it: its log is applied from the first operation, in steps."""

from __future__ import annotations

import logging
import time
from collections import deque

from engines.messages import Outcome, RunAddress
from engines.operations import CHANGES_STATE, OperationKind
from gateway.engine_process import EngineProcess
from gateway.store import Store
from gateway.store.records import Future, RunStatus

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

    Every outcome below `before` must have been committed when the first step is taken. When it is complete, `size` has
    the run's bytes, `pending` says whether it has gradients that no step has used, `seconds` how long it took.
    """

    def __init__(self, store: Store, run_id: str, before: int) -> None:
        self._store = store
        self._run_id = run_id
        self._before = before
        self._after = -1
        self._page: deque[tuple[Future, bytes | None]] = deque()
        self._applied = 0
        self.size: int | None = None
        self.pending = False
        self.seconds = 0.0

    async def step(self, engine: EngineProcess) -> bool:
        """Apply the next operations; whether the run is complete. Raises RestoreFailed, NoRoom and EngineLost."""
        begun = time.monotonic()
        if self._after < 0:
            await self._require_run()
        complete = await self._apply_until(engine, begun + _STEP_S)
        self.seconds += time.monotonic() - begun
        return complete

    async def _apply_until(self, engine: EngineProcess, deadline: float) -> bool:
        while self._page or await self._read_page():
            await self._apply_next(engine)
            if time.monotonic() > deadline:
                return False
        if not self._applied:
            raise RestoreFailed(
                "server", f"run {self._run_id} has no first operation in its log; create a new run"
            )
        name = engine.config.name
        log.info(
            "run %s is restored in engine %s: %d operations applied again", self._run_id, name, self._applied
        )
        return True

    async def _require_run(self) -> None:
        run = await self._store.runs.get(self._run_id)
        if run is None or run.status is RunStatus.FAILED:
            raise RestoreFailed("user", f"run {self._run_id} could not be created; create a new one")

    async def _read_page(self) -> bool:
        kinds = sorted(CHANGES_STATE)
        page = await self._store.futures.applied_to_run(self._run_id, self._after, self._before, kinds, _PAGE)
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
        failure = performed.outcomes[0].failure
        if failure is not None:
            raise RestoreFailed(
                "server",
                f"the run could not be restored: {future.kind} {future.seq_id} succeeded before and now failed: "
                f"{failure.message}",
                passing=failure.category == "server",
            )
        if kind == "create_run":
            self.size = size_of(performed.outcomes[0])
        self.pending = kind == "forward_backward"
        self._applied += 1


def size_of(outcome: Outcome) -> int | None:
    """Bytes of a run that has been created, where the engine tells them."""
    size = outcome.summary.get("bytes")
    return None if size is None else int(size)
