"""What the gateway and an engine process say to each other: few typed messages over one ZeroMQ socket pair.

A message is one header frame (msgpack of a struct below) followed by payload frames (encoded operations or results)
that the gateway passes on without decoding. The engine speaks first (`Hello`); after `Load` it answers `Ready` or
`LoadFailed`. Numbers in `call_id` are the gateway's and come back unchanged.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engines.interface import EngineConfig, EngineInfo
from engines.operations import OperationKind

PROTOCOL = 4
"""Raised when a message, or the page of vital signs, changes its meaning; gateway and engine process must agree."""


EXIT_OWNER_GONE = 3
"""Exit status of an engine process that ends because its owner is gone or silent."""
EXIT_NODE_LOST = 5
"""Exit status of what stands in for an engine process on another node, when that cannot be reached any more."""


class RunAddress(msgspec.Struct, frozen=True, array_like=True):
    """The place of one operation: its run and its number in the run's log."""

    run_id: str
    seq_id: int


class Failure(msgspec.Struct, frozen=True):
    """Why an operation failed, in a sentence for the person who sent it.

    `user`: the input must change. `server`: not the sender's fault; the details are in the log under `error_id`.
    """

    category: Literal["user", "server"]
    message: str
    error_id: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """What became of one operation. Its result is the next payload frame, unless it failed.

    `summary` repeats the few numbers that the gateway keeps as metrics of the run (`loss`, `tokens`, `grad_norm`,
    `seconds`) or needs itself (`bytes`, what a new run occupies), so that it need not decode the result. `digest` is
    there when the operation has changed a run in a deterministic engine: the first 16 bytes of the SHA-256 of the
    encoded result, which a replay must give too.
    """

    failure: Failure | None = None
    summary: dict[str, float] = {}
    digest: bytes = b""


# ---------------------------------------------------------------------------- gateway -> engine


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load the base model. Sent once, as the answer to `Hello`."""

    config: EngineConfig


class Perform(msgspec.Struct, frozen=True, tag="perform"):
    """Perform one operation of each of several runs, all of one kind. One payload frame an operation.

    `replay` marks operations that have been answered before: they are applied, results are not sent back.
    """

    call_id: int
    epoch: int
    kind: OperationKind
    runs: list[RunAddress]
    replay: bool = False


class TakeSnapshot(msgspec.Struct, frozen=True, tag="take_snapshot"):
    """Write a run's state to the storage key `folder`. It is copied between two calls and written beside them.

    `seq_id` is the last operation that has changed the run; when that is another one, the snapshot is refused.
    """

    call_id: int
    epoch: int
    run_id: str
    seq_id: int
    folder: str


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Have a run as it was after operation `seq_id`, of the snapshot in `folder`. The payload frame is its create_run.

    Answered by `Performed` with one outcome and no payload. A failure of category `user` says what is damaged: a file
    that is missing, or has another SHA-256 than `checksums` says.
    """

    call_id: int
    epoch: int
    run_id: str
    seq_id: int
    folder: str
    checksums: dict[str, str]


class Sample(msgspec.Struct, frozen=True, tag="sample"):
    """Sample; the payload frame holds the SampleRequest. With `stream` every step's tokens are sent at once.

    `party` is an opaque name of whom it is for: what an engine cannot do at once it shares among parties.
    """

    call_id: int
    stream: bool = False
    party: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget a sample; it is answered with neither a result nor a failure."""

    call_id: int


class DropRun(msgspec.Struct, frozen=True, tag="drop_run"):
    """Free what a run occupies. Unknown runs are no error."""

    run_id: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Sign of life of the owner; an engine that hears nothing for `EngineConfig.owner_timeout_s` exits."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish the call at hand and exit with status 0."""


ToEngine = Load | Perform | TakeSnapshot | Restore | Sample | Cancel | DropRun | Ping | Stop

# ---------------------------------------------------------------------------- engine -> gateway


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a process."""

    protocol: int
    pid: int
    python: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The base model is loaded. Payload frames: the tokenizer's files, one for each name in `tokenizer_files`."""

    info: EngineInfo
    tokenizer_files: list[str]


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The base model cannot be loaded; the process exits. When it is `final`, `message` says what to change, and a
    further try is of no use before that."""

    message: str
    final: bool = False


class Performed(msgspec.Struct, frozen=True, tag="performed"):
    """Answer to `Perform`: one outcome for each run, in order; one payload frame for each that succeeded and is no
    replay. `lost_runs` have been dropped because their state is in doubt: the gateway restores them from their log.
    `no_room` has the bytes of each run that was not created because it does not fit beside the others; it may come
    again when others have been dropped."""

    call_id: int
    outcomes: list[Outcome]
    lost_runs: list[str] = []
    no_room: dict[str, int] = {}


class SnapshotTaken(msgspec.Struct, frozen=True, tag="snapshot_taken"):
    """Answer to `TakeSnapshot` when its files are complete and synced: their bytes, the SHA-256, hex, of each,
    and how long writing them took."""

    call_id: int
    failure: Failure | None = None
    size_bytes: int = 0
    checksums: dict[str, str] = {}
    seconds: float = 0.0


class Sampled(msgspec.Struct, frozen=True, tag="sampled"):
    """Answer to `Sample`: the payload frame is its SampleResult, unless it failed.

    What has been used, so that the gateway need not decode the result: tokens of the prompt, which counts once, those
    of them that were not computed again, and tokens of all sequences.
    """

    call_id: int
    failure: Failure | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0


class SampleDelta(msgspec.Struct, frozen=True, tag="sample_delta"):
    """New tokens of one sequence of a streamed sample; `top_logprobs[i]` are (token, logprob) pairs, best first."""

    call_id: int
    sequence: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] = []
    stop_reason: Literal["stop", "length"] | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Answer to `Ping`, sent between calls; `stats` are the engine's counters by name. Signs of life are elsewhere: in
    `engines.vitals`."""

    stats: dict[str, float]


FromEngine = Hello | Ready | LoadFailed | Performed | SnapshotTaken | Sampled | SampleDelta | Pong

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine, *payloads: bytes) -> list[bytes]:
    """The frames of a message."""
    return [_ENCODER.encode(message), *payloads]


def unpack_to_engine(frames: list[bytes]) -> tuple[ToEngine, list[bytes]]:
    """Header and payload frames of a message from the gateway; raises msgspec.ValidationError."""
    return _TO_ENGINE.decode(frames[0]), frames[1:]


def unpack_from_engine(frames: list[bytes]) -> tuple[FromEngine, list[bytes]]:
    """Header and payload frames of a message from an engine; raises msgspec.ValidationError."""
    return _FROM_ENGINE.decode(frames[0]), frames[1:]


def schema() -> dict[str, Any]:
    """JSON schema of both directions, for the documentation."""
    return {
        "to_engine": msgspec.json.schema(ToEngine),
        "from_engine": msgspec.json.schema(FromEngine),
    }
