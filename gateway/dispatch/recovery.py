"""Building a run again in an engine that does not have it: apply its log from the first operation."""

from __future__ import annotations

import logging

from engines.messages import RunAddress
from engines.operations import CHANGES_STATE, OperationKind
from gateway.engine_process import EngineProcess
from gateway.store import Store
from gateway.store.records import Future, RunStatus

log = logging.getLogger(__name__)

_PAGE = 32


class RestoreFailed(Exception):
    """The run cannot be built again; the message says why and what its owner can do."""

    def __init__(self, category: str, message: str) -> None:
        super().__init__(message)
        self.category = category


async def restore_run(store: Store, engine: EngineProcess, run_id: str, before: int) -> None:
    """Apply everything of the log that took effect below seq_id `before`. Raises RestoreFailed and EngineLost."""
    run = await store.runs.get(run_id)
    if run is None or run.status is RunStatus.FAILED:
        raise RestoreFailed("user", f"run {run_id} could not be created; create a new one")
    kinds = sorted(CHANGES_STATE)
    after, applied = -1, 0
    while page := await store.futures.applied_to_run(run_id, after, before, kinds, _PAGE):
        inputs = await store.futures.inputs(future.request_id for future in page)
        for future in page:
            await _apply_again(engine, future, inputs)
        after = page[-1].seq_id
        applied += len(page)
    if not applied:
        raise RestoreFailed("server", f"run {run_id} has no first operation in its log; create a new run")
    log.info(
        "run %s is restored in engine %s: %d operations applied again", run_id, engine.config.name, applied
    )


async def _apply_again(engine: EngineProcess, future: Future, inputs: dict[str, bytes]) -> None:
    body = inputs.get(future.request_id)
    if body is None:
        raise RestoreFailed(
            "server", f"the input of {future.request_id} is missing; the run cannot be restored"
        )
    kind: OperationKind = future.kind  # type: ignore[assignment]
    address = RunAddress(future.run_id or "", future.seq_id)
    performed, _ = await engine.perform(kind, [address], [body], replay=True)
    failure = performed.outcomes[0].failure
    if failure is not None:
        raise RestoreFailed(
            "server",
            f"the run could not be restored: {future.kind} {future.seq_id} succeeded before and now failed: "
            f"{failure.message}",
        )
