"""Training calls in the engine process: decode → admit → have the engine perform → sum up.

Here stands what keeps an operation from being applied twice: for each run the number of the last one applied, and
the newest epoch seen. Neither outlives the process, and neither must: a new process begins with no runs at all.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from engines.checks import check_operation
from engines.interface import Engine, EngineInfo, RunOperation, UserError
from engines.messages import Failure, Outcome, Perform, Performed, RunAddress
from engines.operations import (
    CHANGES_STATE,
    CreateRun,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    Operation,
    OperationKind,
    OptimStep,
    OptimStepResult,
    Result,
    SaveWeights,
    decode_operation,
    encode,
)

log = logging.getLogger(__name__)

_TYPES: dict[OperationKind, type[Operation]] = {
    "create_run": CreateRun,
    "forward_backward": ForwardBackward,
    "forward": Forward,
    "optim_step": OptimStep,
    "save_weights": SaveWeights,
    "load_weights": LoadWeights,
}

Verb = Callable[[Sequence[RunOperation[Any]]], Sequence[Any]]


class Item(NamedTuple):
    """An operation that may be performed, and its place in the call."""

    place: int
    address: RunAddress
    operation: Operation


class TrainingCalls:
    """The runs of one engine, and what has been applied to each."""

    def __init__(self, engine: Engine, info: EngineInfo, epoch: int) -> None:
        self._engine = engine
        self._info = info
        self._epoch = epoch
        self._applied: dict[str, int] = {}
        self._verbs: dict[OperationKind, Verb] = {
            "create_run": engine.create_runs,
            "forward_backward": engine.forward_backward,
            "forward": engine.forward,
            "optim_step": engine.optim_step,
            "save_weights": engine.save_weights,
            "load_weights": engine.load_weights,
        }

    def perform(self, call: Perform, bodies: Sequence[bytes]) -> tuple[Performed, list[bytes]]:
        """The answer to a call: an outcome for each run, and the encoded results unless it is a replay.

        Raises ValueError when the call does not carry one body for each run.
        """
        outcomes: list[Outcome | None] = [None] * len(call.runs)
        payloads: dict[int, bytes] = {}
        lost: list[str] = []
        items = self._admit(call, bodies, outcomes, lost)
        begun = time.perf_counter()
        results = self._call_engine(call.kind, items) if items else []
        seconds = time.perf_counter() - begun
        if isinstance(results, Failure):
            if call.kind in CHANGES_STATE:
                lost += [item.address.run_id for item in items]
            results = [results] * len(items)
        for item, result in zip(items, results, strict=True):
            if isinstance(result, Failure):
                outcomes[item.place] = Outcome(failure=result)
                continue
            self._applied[item.address.run_id] = item.address.seq_id
            outcomes[item.place] = Outcome(summary=_summary(item.operation, result, seconds))
            if not call.replay:
                payloads[item.place] = encode(result)
        complete = [outcome for outcome in outcomes if outcome is not None]
        return Performed(call.call_id, complete, lost), [payloads[place] for place in sorted(payloads)]

    def drop(self, run_id: str) -> None:
        """Free a run; an unknown one is no error."""
        self._applied.pop(run_id, None)
        self._engine.drop_run(run_id)

    # ------------------------------------------------------------------ admit

    def _admit(
        self, call: Perform, bodies: Sequence[bytes], outcomes: list[Outcome | None], lost: list[str]
    ) -> list[Item]:
        """The operations that may be performed; the others get their failures in `outcomes`."""
        self._epoch = max(self._epoch, call.epoch)
        items: list[Item] = []
        taken: set[str] = set()
        for place, (address, body) in enumerate(zip(call.runs, bodies, strict=True)):
            refusal = self._refusal(call, address, taken)
            if refusal is not None:
                outcomes[place] = Outcome(failure=Failure("server", refusal))
                if call.epoch == self._epoch and self._unknown(call, address):
                    lost.append(address.run_id)
                continue
            try:
                items.append(Item(place, address, self._decode(call.kind, body)))
                taken.add(address.run_id)
            except UserError as error:
                outcomes[place] = Outcome(failure=Failure("user", str(error)))
        return items

    def _refusal(self, call: Perform, address: RunAddress, taken: set[str]) -> str | None:
        """Why an operation must not reach the engine, whatever it holds."""
        run_id, seq_id = address.run_id, address.seq_id
        if call.epoch < self._epoch:
            return (
                f"operation {seq_id} of run {run_id} comes from an earlier owner of this engine "
                f"(epoch {call.epoch}, now {self._epoch}); it was not performed"
            )
        if run_id in taken:
            return f"one call holds two operations of run {run_id}; operation {seq_id} was not performed"
        if self._unknown(call, address):
            return f"run {run_id} is not in this engine's memory; operation {seq_id} was not performed"
        if call.kind != "create_run" and seq_id <= self._applied[run_id]:
            return (
                f"operation {seq_id} of run {run_id} came after operation {self._applied[run_id]} had been applied; "
                "it was not performed"
            )
        return None

    def _unknown(self, call: Perform, address: RunAddress) -> bool:
        return call.kind != "create_run" and address.run_id not in self._applied

    def _decode(self, kind: OperationKind, body: bytes) -> Operation:
        """The checked operation; raises UserError."""
        try:
            operation = decode_operation(body)
        except msgspec.DecodeError as error:
            raise UserError(f"the input is no operation: {error}") from error
        if not isinstance(operation, _TYPES[kind]):
            raise UserError(f"the input is a {type(operation).__name__}, the call asks for {kind}")
        check_operation(operation, self._info)
        return operation

    # ------------------------------------------------------------------ perform

    def _call_engine(self, kind: OperationKind, items: Sequence[Item]) -> list[Any] | Failure:
        """A result or failure for each item, or one failure when the engine broke.

        The runs of a call that changes them are dropped then; what only reads them leaves them as they were.
        """
        operations = [RunOperation(item.address.run_id, item.operation) for item in items]
        try:
            results = self._verbs[kind](operations)
            if len(results) != len(items):
                raise RuntimeError(f"{kind} returned {len(results)} results for {len(items)} operations")
        except (
            Exception
        ) as error:  # the process boundary: a plugin may raise anything, and its other runs go on
            places = ", ".join(f"{item.address.run_id}#{item.address.seq_id}" for item in items)
            failure = _failure(error, kind, places)
            for item in items if kind in CHANGES_STATE else ():
                self.drop(item.address.run_id)
            return failure
        return [Failure("user", str(each)) if isinstance(each, UserError) else each for each in results]


def _failure(error: Exception, kind: OperationKind, places: str) -> Failure:
    """The failure of a call. Storage that cannot be written to is named: its operator can do something about it."""
    failure = failure_of_engine(error, "this operation", f"{kind} of {places}")
    if kind != "save_weights" or not isinstance(error, OSError):
        return failure
    cause = "the operating system refused" if error.errno is None else os.strerror(error.errno)
    message = (
        f"the weights were not saved: the server's storage cannot be written to ({cause}). The run goes on "
        f"unchanged; save again when the storage is in order. The engine's log says more under {failure.error_id}"
    )
    return Failure("server", message, failure.error_id)


def failure_of_engine(error: Exception, what: str, details: str) -> Failure:
    """The failure to answer with when an engine raised what it should not; the log gets the traceback."""
    error_id = secrets.token_hex(6)
    log.error("error %s: the engine failed at %s", error_id, details, exc_info=error)
    message = f"the engine failed at {what}; its log says why under {error_id}"
    return Failure("server", message, error_id)


def _summary(operation: Operation, result: Result, seconds: float) -> dict[str, float]:
    """The numbers that are kept as metrics of the run. `seconds` is the time of the whole call."""
    summary = {"seconds": seconds}
    if isinstance(operation, (Forward, ForwardBackward)) and isinstance(result, ForwardResult):
        summary["loss"] = result.metrics["loss:sum"]
        summary["tokens"] = float(sum(datum.tokens.shape[0] for datum in operation.data))
    if isinstance(operation, OptimStep) and isinstance(result, OptimStepResult):
        summary["grad_norm"] = result.metrics["unclipped_grad_l2:mean"]
        summary["learning_rate"] = operation.learning_rate
    return summary
