"""What rank 0 tells the others to do, and what ranks tell each other about a call: few typed messages, as msgpack."""

from __future__ import annotations

import msgspec

from engines.interface import EngineConfig
from engines.operations import CreateRun, Forward, ForwardBackward, LoadWeights, OptimStep


class Load(msgspec.Struct, frozen=True, tag="load"):
    """The first call: hold your part of the model in the folder `config.model`. `device` is `cpu` or `cuda`."""

    config: EngineConfig
    device: str


class CreateRuns(msgspec.Struct, frozen=True, tag="create_runs"):
    """Make or replace runs."""

    items: list[tuple[str, CreateRun]]


class LoadRuns(msgspec.Struct, frozen=True, tag="load_runs"):
    """Replace the weights of runs that are there."""

    items: list[tuple[str, LoadWeights]]


class DropRun(msgspec.Struct, frozen=True, tag="drop_run"):
    """Forget a run."""

    run_id: str


class Evaluate(msgspec.Struct, frozen=True, tag="evaluate"):
    """Losses and log-probs; nothing changes."""

    items: list[tuple[str, Forward]]


class Train(msgspec.Struct, frozen=True, tag="train"):
    """Losses, log-probs and gradients."""

    items: list[tuple[str, ForwardBackward]]


class StepRuns(msgspec.Struct, frozen=True, tag="step_runs"):
    """One optimizer step of each run."""

    items: list[tuple[str, OptimStep]]


class GatherRun(msgspec.Struct, frozen=True, tag="gather_run"):
    """Put a whole run together on rank 0."""

    run_id: str


Call = CreateRuns | LoadRuns | DropRun | Evaluate | Train | StepRuns | GatherRun


class Loaded(msgspec.Struct, frozen=True):
    """What a rank says when it has tried to load: nothing, or what is to be changed."""

    refusal: str = ""


class Stored(msgspec.Struct, frozen=True):
    """A run of the whole model, or a rank's part: float32 bytes of its values, of the pending gradient if there is one
    (`pending`), and of both moments once there are any."""

    steps: int
    vectors: list[bytes]
    pending: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """What a rank knows of one operation: the loss of its own data, and what the loss tells besides; whether the
    gradient that it holds is finite; why the loss refused its data."""

    loss: float
    metrics: dict[str, float]
    sound: bool
    refusal: str | None


class Scores(msgspec.Struct, frozen=True):
    """Log-probs of one datum: `operation` of the call, `member` of its data; float32 bytes of its targets' shape."""

    operation: int
    member: int
    logprobs: bytes


_ENCODER = msgspec.msgpack.Encoder()
_LOAD = msgspec.msgpack.Decoder(Load)
_CALL: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_STORED = msgspec.msgpack.Decoder(Stored)
_LOADED = msgspec.msgpack.Decoder(Loaded)
_VERDICTS = msgspec.msgpack.Decoder(list[Verdict])
_SCORES = msgspec.msgpack.Decoder(list[Scores])
_SQUARES = msgspec.msgpack.Decoder(list[float])

encode = _ENCODER.encode
decode_load = _LOAD.decode
decode_call = _CALL.decode
decode_stored = _STORED.decode
decode_loaded = _LOADED.decode
decode_verdicts = _VERDICTS.decode
decode_scores = _SCORES.decode
decode_squares = _SQUARES.decode
