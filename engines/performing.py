"""Training calls in the engine process: decode → admit → have the engine perform → sum up.

Here stands what keeps an operation from being applied twice: for each run the number of the last one applied, and
the newest epoch seen. Neither outlives the process, and neither must: a new process begins with no runs at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from engines.checks import check_operation
from engines.distant_folders import StorageUnreachable
from engines.interface import (
    DamagedWeights,
    Engine,
    EngineConfig,
    EngineInfo,
    OutOfMemory,
    PendingSnapshot,
    RunOperation,
    UserError,
    WeightsOutOfReach,
)
from engines.memory import RunMemory
from engines.messages import Failure, Outcome, Perform, Performed, Restore, RunAddress, TakeSnapshot
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
from engines.storage import FolderStorage, verify

log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_NO_ROOM = Failure("server", "the run has no room in the engine's memory now")

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


class Answer:
    """What is to be said about the operations of one call, by their places in it."""

    def __init__(self, call: Perform) -> None:
        self.call_id = call.call_id
        self.outcomes: list[Outcome | None] = [None] * len(call.runs)
        self.payloads: dict[int, bytes] = {}
        self.lost: list[str] = []
        self.no_room: dict[str, int] = {}

    def fail(self, place: int, failure: Failure) -> None:
        """An operation had no effect."""
        self.outcomes[place] = Outcome(failure=failure)

    def performed(self) -> Performed:
        """The header of the message."""
        complete = [outcome for outcome in self.outcomes if outcome is not None]
        return Performed(self.call_id, complete, self.lost, self.no_room)


class TrainingCalls:
    """The runs of one engine, and what has been applied to each."""

    def __init__(self, engine: Engine, info: EngineInfo, config: EngineConfig) -> None:
        self._engine = engine
        self._info = info
        self._epoch = config.epoch
        self._storage = FolderStorage.of(config)
        self._memory = RunMemory(info.run_memory_bytes)
        self._applied: dict[str, int] = {}
        self._changed: dict[str, int] = {}
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
        answer = Answer(call)
        items = self._admit(call, bodies, answer)
        begun = time.perf_counter()
        results = self._call_engine(call, items) if items else []
        seconds = time.perf_counter() - begun
        if isinstance(results, Failure):
            if call.kind in CHANGES_STATE:
                answer.lost += [item.address.run_id for item in items]
            results = [results] * len(items)
        for item, result in zip(items, results, strict=True):
            if isinstance(result, (Failure, UserError)):
                self._fail(call, item, result, answer)
                continue
            encoded = encode(result)
            answer.outcomes[item.place] = Outcome(
                summary=self._summary(item.operation, result, seconds),
                digest=self._applied_now(call.kind, item, encoded),
            )
            if not call.replay:
                answer.payloads[item.place] = encoded
        return answer.performed(), [answer.payloads[place] for place in sorted(answer.payloads)]

    def drop(self, run_id: str) -> None:
        """Free a run; an unknown one is no error."""
        self._applied.pop(run_id, None)
        self._changed.pop(run_id, None)
        self._engine.drop_run(run_id)
        self._memory.give_back(run_id)

    def stats(self) -> dict[str, float]:
        """Counters for the metrics page."""
        return {"run_bytes": self._memory.used, "run_memory_bytes": self._memory.limit}

    def _give_back_unless_there(self, run_id: str) -> None:
        """A run that was to come has not come; one that was there before still is."""
        if run_id not in self._applied:
            self._memory.give_back(run_id)

    def _applied_now(self, kind: OperationKind, item: Item, result: bytes) -> bytes:
        """Remember the operation as its run's last one; gives the digest by which its replay is compared."""
        run_id, seq_id = item.address.run_id, item.address.seq_id
        self._applied[run_id] = seq_id
        if kind not in CHANGES_STATE:
            return b""
        self._changed[run_id] = seq_id
        return hashlib.sha256(result).digest()[:_DIGEST_BYTES] if self._info.deterministic else b""

    # ------------------------------------------------------------------ snapshots

    def snapshot(self, call: TakeSnapshot) -> PendingSnapshot | Failure:
        """A copy of the run's state, which must be that after operation `seq_id`."""
        where = f"a snapshot of run {call.run_id} after operation {call.seq_id}"
        changed = self._changed.get(call.run_id)
        if (owner := self._newer_owner(call.epoch)) is not None:
            return Failure("server", f"{where} was not taken: {owner}")
        if changed != call.seq_id:
            stands = "it is not in memory" if changed is None else f"it stands after operation {changed}"
            return Failure("server", f"{where} was not taken: {stands}")
        try:
            return self._engine.snapshot(call.run_id)
        except UserError as error:
            return Failure("server", f"{where} was not taken: {error}")
        except Exception as error:  # boundary: a plugin may raise anything; copying has changed nothing
            return failure_of_engine(error, "taking a snapshot", where)

    def restore(self, call: Restore, body: bytes) -> Performed:
        """Put a run back to what its snapshot holds, if that is what was written, and if there is room for it."""
        if (owner := self._newer_owner(call.epoch)) is not None:
            failure = Failure("server", f"run {call.run_id} was not restored: {owner}")
            return Performed(call.call_id, [Outcome(failure)])
        try:
            operation = self._decode("create_run", body)
            assert isinstance(operation, CreateRun)
            size = self._engine.run_bytes(operation.lora)
            if not self._memory.take(call.run_id, size):
                return Performed(call.call_id, [Outcome(_NO_ROOM)], no_room={call.run_id: size})
        except UserError as error:  # no damage: the engine's limit is lower than it was
            return Performed(call.call_id, [Outcome(Failure("server", str(error)))])
        problem = self._restore(call, operation)
        self._storage.drop_copy(call.folder)
        if problem is None:
            return Performed(call.call_id, [Outcome(summary={"bytes": float(size)})])
        self._give_back_unless_there(call.run_id)
        if isinstance(problem, OutOfMemory):
            return Performed(call.call_id, [Outcome(_NO_ROOM)], no_room={call.run_id: size})
        return Performed(call.call_id, [Outcome(problem)])

    def _restore(self, call: Restore, operation: CreateRun) -> Failure | OutOfMemory | None:
        try:
            verify(self._storage, call.folder, call.checksums)
            result = self._engine.restore(call.run_id, operation, call.folder)
        except UserError as error:
            result = error
        except Exception as error:  # boundary: a plugin may raise anything, and its other runs go on
            self.drop(call.run_id)
            return failure_of_engine(error, "restoring a run", f"restoring {call.run_id} from {call.folder}")
        if isinstance(result, UserError):
            return result if isinstance(result, OutOfMemory) else Failure("user", str(result))
        self._applied[call.run_id] = self._changed[call.run_id] = call.seq_id
        return None

    def _newer_owner(self, epoch: int) -> str | None:
        """Why a call of this epoch must not be answered; None: it may. Later ones must be of this epoch too."""
        self._epoch = max(self._epoch, epoch)
        if epoch == self._epoch:
            return None
        return f"it comes from an earlier owner of this engine (epoch {epoch}, now {self._epoch})"

    # ------------------------------------------------------------------ admit

    def _admit(self, call: Perform, bodies: Sequence[bytes], answer: Answer) -> list[Item]:
        """The operations that may be performed; the answer gets the failures of the others."""
        stale = self._newer_owner(call.epoch)
        items: list[Item] = []
        taken: set[str] = set()
        for place, (address, body) in enumerate(zip(call.runs, bodies, strict=True)):
            refusal = self._refusal(call, address, taken, stale)
            if refusal is not None:
                answer.fail(place, Failure("server", refusal))
                if stale is None and self._unknown(call, address):
                    answer.lost.append(address.run_id)
                continue
            try:
                operation = self._decode(call.kind, body)
                if self._has_room(address, operation, answer):
                    items.append(Item(place, address, operation))
                    taken.add(address.run_id)
                else:
                    answer.fail(place, _NO_ROOM)
            except UserError as error:
                answer.fail(place, Failure("user", str(error)))
        return items

    def _has_room(self, address: RunAddress, operation: Operation, answer: Answer) -> bool:
        """Whether the run fits that an operation would create; raises UserError when it never does."""
        if not isinstance(operation, CreateRun):
            return True
        size = self._engine.run_bytes(operation.lora)
        if self._memory.take(address.run_id, size):
            return True
        answer.no_room[address.run_id] = size
        return False

    def _refusal(self, call: Perform, address: RunAddress, taken: set[str], stale: str | None) -> str | None:
        """Why an operation must not reach the engine, whatever it holds."""
        run_id, seq_id = address.run_id, address.seq_id
        if stale is not None:
            return f"operation {seq_id} of run {run_id} was not performed: {stale}"
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

    def _call_engine(self, call: Perform, items: Sequence[Item]) -> list[Any] | Failure:
        """A result or UserError for each item, or one failure when the engine broke.

        The runs of a call that changes them are dropped then; what only reads them leaves them as they were.
        """
        kind = call.kind
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
        return list(results)

    def _fail(self, call: Perform, item: Item, error: Failure | UserError, answer: Answer) -> None:
        """An operation was not applied. A run for which memory was not enough may come again when others have left."""
        run_id, operation = item.address.run_id, item.operation
        if isinstance(error, OutOfMemory) and isinstance(operation, CreateRun):
            answer.no_room[run_id] = self._engine.run_bytes(operation.lora)
        if isinstance(error, UserError):
            error = refused(error, f"{call.kind} of {run_id}#{item.address.seq_id}", replay=call.replay)
        answer.fail(item.place, error)
        self._give_back_unless_there(run_id)

    def _summary(self, operation: Operation, result: Result, seconds: float) -> dict[str, float]:
        """The numbers that are kept as metrics of the run. `seconds` is the time of the whole call."""
        summary = {"seconds": seconds}
        if isinstance(operation, CreateRun):
            summary["bytes"] = float(self._engine.run_bytes(operation.lora))
        if isinstance(operation, (Forward, ForwardBackward)) and isinstance(result, ForwardResult):
            summary["loss"] = result.metrics["loss:sum"]
            summary["tokens"] = float(sum(datum.tokens.shape[0] for datum in operation.data))
        if isinstance(operation, OptimStep) and isinstance(result, OptimStepResult):
            summary["grad_norm"] = result.metrics["unclipped_grad_l2:mean"]
            summary["learning_rate"] = operation.learning_rate
        return summary


def _failure(error: Exception, kind: OperationKind, places: str) -> Failure:
    """The failure of a call. Storage that cannot be written to is named: its operator can do something about it."""
    failure = failure_of_engine(error, "this operation", f"{kind} of {places}")
    if isinstance(error, MemoryError):
        message = f"memory ran out in this operation; send it again later. The log says more under {failure.error_id}"
        return Failure("server", message, failure.error_id)
    if kind != "save_weights" or not isinstance(error, OSError):
        return failure
    message = (
        f"the weights were not saved: the server's storage cannot be written to ({cause_of(error)}). The run goes on "
        f"unchanged; save again when the storage is in order. The engine's log says more under {failure.error_id}"
    )
    return Failure("server", message, failure.error_id)


def refused(error: UserError, what: str, *, replay: bool = False) -> Failure:
    """The failure of what the engine did not apply. A lack of memory that may pass is the server's, and so is every one
    in a replay, for there was enough the first time; another one is the sender's, who would repeat it in vain. What is
    wrong with stored weights is the server's."""
    if isinstance(error, (DamagedWeights, WeightsOutOfReach)):
        error_id = secrets.token_hex(6)
        log.error("error %s: %s: %s: %s", error_id, what, error.path, error)
        return Failure("server", f"{error}; the engine's log says where under {error_id}", error_id)
    if not isinstance(error, OutOfMemory):
        return Failure("user", str(error))
    error_id = secrets.token_hex(6)
    log.error("error %s: no memory for %s: %s", error_id, what, error)
    return Failure("server" if error.passing or replay else "user", str(error), error_id)


def cause_of(error: OSError) -> str:
    """Why the operating system refused, in its own words; a distant storage's are for the log."""
    if isinstance(error, StorageUnreachable):
        return "it is out of reach"
    return "the operating system refused" if error.errno is None else os.strerror(error.errno)


def failure_of_engine(error: Exception, what: str, details: str) -> Failure:
    """The failure to answer with when an engine raised what it should not; the log gets the traceback."""
    error_id = secrets.token_hex(6)
    log.error("error %s: the engine failed at %s", error_id, details, exc_info=error)
    message = f"the engine failed at {what}; its log says why under {error_id}"
    return Failure("server", message, error_id)
