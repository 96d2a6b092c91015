"""From the wire to the neutral form.

Two kinds of error come out of here. `BadRequest`: the body is not of this dialect at all. `UserError`: it is, and asks
for something that cannot be honoured; the caller records that as a failed future, so that its number is consumed and
the sender reads the sentence where the result would have been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from engines.interface import UserError
from engines.operations import (
    Datum,
    Forward,
    ForwardBackward,
    LoraSpec,
    LossConfig,
    OptimStep,
    SampleRequest,
)
from gateway.errors import BadRequest
from gateway.tinker import schemas
from gateway.tinker import wire_pb2 as wire
from gateway.tinker.bodies import decompressed_beginning
from gateway.tinker.tensors import (
    Room,
    input_name,
    matrix_of,
    refuse_unknown,
    tensor_of,
    tensor_of_message,
    tokens_of,
    tokens_of_chunks,
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """Where a forward_backward belongs, and whether it only goes forward."""

    model_id: str
    seq_id: int
    forward_only: bool


Pass = Forward | ForwardBackward

# ---------------------------------------------------------------------------- forward_backward, protobuf


def parse_forward_backward(body: bytes) -> wire.ForwardBackwardRequest:
    """The message. Raises BadRequest when the bytes are none."""
    message = wire.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise BadRequest(f"the body is not a ForwardBackwardRequest: {error}") from error
    return message


def envelope_of(message: wire.ForwardBackwardRequest) -> Envelope:
    """Raises BadRequest when run or number are missing."""
    if not message.model_id:
        raise BadRequest("model_id is missing", param="model_id")
    if message.seq_id < 1:
        raise BadRequest(
            f"seq_id is {message.seq_id}; operations of a run are numbered from 1", param="seq_id"
        )
    return Envelope(message.model_id, message.seq_id, message.forward_only)


def peek_envelope(beginning: bytes, encoding: str | None) -> Envelope | None:
    """Run and number from the first bytes of a body that is too large or broken, if they can be read.

    They are the first two fields of the message, so a short beginning of it is enough.
    """
    if encoding is not None and encoding.strip().lower() == "zstd":
        beginning = decompressed_beginning(beginning)
    for end in range(min(len(beginning), 400), 2, -1):
        message = wire.ForwardBackwardRequest()
        try:
            message.ParseFromString(beginning[:end])
        except DecodeError:
            continue
        if message.model_id and message.seq_id >= 1:
            return Envelope(message.model_id, message.seq_id, message.forward_only)
    return None


def pass_of(message: wire.ForwardBackwardRequest) -> Pass:
    """The operation. Raises UserError naming the field."""
    refuse_unknown(message, "the request")
    room = Room(message.ByteSize())
    data = [_datum(datum, f"data[{index}]", room) for index, datum in enumerate(message.data)]
    kind = Forward if message.forward_only else ForwardBackward
    return kind(data, message.loss_fn, _loss_config(message))


def _loss_config(message: wire.ForwardBackwardRequest) -> LossConfig:
    """The second form of the field has what the first one has, and texts."""
    config: LossConfig = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        where = f"loss_fn_config[{name[:80]!r}]"
        refuse_unknown(value, where)
        match value.WhichOneof("value"):
            case "number":
                config[name] = value.number
            case "text":
                config[name] = value.text
            case _:
                raise UserError(f"{where} has no value; it is a number or a text")
    return config


def _datum(datum: wire.Datum, where: str, room: Room) -> Datum:
    refuse_unknown(datum, where)
    tokens = tokens_of_chunks(datum.model_input, f"{where}.model_input")
    inputs = {
        name: tensor_of_message(tensor, f"{where}.{input_name(name)}", room)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(tokens, inputs)


# ---------------------------------------------------------------------------- forward_backward, JSON


def pass_of_json(body: schemas.ForwardBackwardBody, kind: type[Pass]) -> Pass:
    """The operation of SDKs that do not send protobuf. Raises BadRequest and UserError."""
    field, other = "forward_backward_input", "forward_input"
    if kind is Forward:
        field, other = other, field
    given: schemas.PassInput | None = getattr(body, field)
    if given is None or getattr(body, other) is not None:
        raise BadRequest(f"give {field}, and not {other}, which another route takes", param=field)
    room = Room(8 * sum(_numbers(datum) for datum in given.data))
    data = [_json_datum(datum, f"data[{index}]", room) for index, datum in enumerate(given.data)]
    return kind(data, given.loss_fn, dict(given.loss_fn_config or {}))


def _numbers(datum: schemas.JsonDatum) -> int:
    """How many numbers the tensors list."""
    return sum(
        len(tensor.data) + len(tensor.sparse_crow_indices or ()) + len(tensor.sparse_col_indices or ())
        for tensor in datum.loss_fn_inputs.values()
    )


def _json_datum(datum: schemas.JsonDatum, where: str, room: Room) -> Datum:
    inputs = {
        name: tensor_of(tensor, f"{where}.{input_name(name)}", room)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(tokens_of(datum.model_input, f"{where}.model_input"), inputs)


# ---------------------------------------------------------------------------- the rest


def lora_of(config: schemas.LoraConfig | None, draw_seed: Callable[[], int]) -> LoraSpec:
    """The adapter's configuration; what is left out is the SDK's default, and a missing seed is drawn."""
    given = config if config is not None else schemas.LoraConfig()
    return LoraSpec(
        rank=given.rank,
        seed=_seed(given.seed, draw_seed),
        train_attn=given.train_attn is not False,
        train_mlp=given.train_mlp is not False,
        train_unembed=given.train_unembed is not False,
    )


def _seed(given: int | None, draw_seed: Callable[[], int]) -> int:
    if given is None:
        return draw_seed()
    if not -(2**63) <= given < 2**64:
        raise UserError(f"seed is {given}; it must fit into 64 bits")
    return given


def require_adamw(config: dict[str, Any] | None) -> None:
    """Raises BadRequest for an optimizer that is not trained here, or a variant of it."""
    if config is None:
        return
    family = config.get("type") or "adamw"
    if family != "adamw":
        raise BadRequest(
            f"optimizer_config.type is {str(family)[:40]!r}; allowed is adamw{_why_not(family)}",
            param="optimizer_config",
        )
    for name, value in config.items():
        if name != "type" and value:
            raise BadRequest(
                f"optimizer_config has {name[:40]!r}; adamw takes no settings there: they come with each step, in "
                "adam_params",
                param="optimizer_config",
            )


def _why_not(family: object) -> str:
    """Something that works differently under the same name would be worse than nothing."""
    return " (how dimuon makes its steps is not public)" if family == "dimuon" else ""


def optim_step_of(body: schemas.OptimStepBody) -> OptimStep:
    """The step; what is left out is the SDK's default. Raises UserError for another optimizer's parameters."""
    if body.optimizer_params is not None:
        family = body.optimizer_params.get("type")
        raise UserError(
            f"optimizer_params.type is {str(family)[:40]!r}; this run's optimizer is adamw: send adam_params"
            f"{_why_not(family)}"
        )
    given = body.adam_params if body.adam_params is not None else schemas.AdamParams()
    return OptimStep(
        learning_rate=given.learning_rate,
        beta1=given.beta1,
        beta2=given.beta2,
        eps=given.eps,
        weight_decay=given.weight_decay,
        grad_clip_norm=given.grad_clip_norm,
    )


def sample_of(body: schemas.SampleBody, draw_seed: Callable[[], int]) -> SampleRequest:
    """The request, without its adapter. Raises UserError for what is not served."""
    if body.record_stability_info:
        raise UserError(
            "record_stability_info is true; it belongs to the loss stable_reinforce, which is not served here: leave "
            "it out, and train with importance_sampling, ppo or cispo"
        )
    targets = body.target_prompt_logprobs
    params = body.sampling_params if body.sampling_params is not None else schemas.SamplingParams()
    stop = params.stop
    stop_list = [stop] if isinstance(stop, str) else list(stop or [])
    return SampleRequest(
        prompt=tokens_of(body.prompt, "prompt"),
        num_samples=1 if body.num_samples is None else body.num_samples,
        seed=_seed(params.seed, draw_seed),
        max_tokens=params.max_tokens,
        temperature=1.0 if params.temperature is None else params.temperature,
        top_k=-1 if params.top_k is None else params.top_k,
        top_p=1.0 if params.top_p is None else params.top_p,
        stop_strings=tuple(item for item in stop_list if isinstance(item, str)),
        stop_tokens=tuple(item for item in stop_list if isinstance(item, int)),
        stop_at_eos=stop is None or bool(stop_list),
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_prompt_logprobs=body.topk_prompt_logprobs or 0,
        topk_sample_logprobs=body.topk_sample_logprobs or 0,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        target_prompt_tokens=None if targets is None else matrix_of(targets, "target_prompt_logprobs"),
        prompt_alternatives=body.prompt_alt_tokens_k or 0,
    )
