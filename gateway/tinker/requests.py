"""From the wire to the neutral form.

Two kinds of error come out of here. `BadRequest`: the body is not of this dialect at all. `UserError`: it is, and asks
for something that cannot be honoured; the caller records that as a failed future, so that its number is consumed and
the sender reads the sentence where the result would have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

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
from engines.tensors import Tensor
from gateway.errors import BadRequest
from gateway.tinker import schemas
from gateway.tinker import wire_pb2 as wire
from gateway.tinker.bodies import decompressed_beginning

_LARGEST_DENSE = 64 << 20
"""Items that a sparse tensor may have when it is written out."""

_NUMPY: dict[int, np.dtype[Any]] = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
}


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
    if encoding == "zstd":
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
    _refuse_unknown(message, "the request")
    config: LossConfig = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    data = [_datum(datum, f"data[{index}]") for index, datum in enumerate(message.data)]
    kind = Forward if message.forward_only else ForwardBackward
    return kind(data, message.loss_fn, config)


def _datum(datum: wire.Datum, where: str) -> Datum:
    _refuse_unknown(datum, where)
    parts = [
        _chunk_tokens(chunk, f"{where}.model_input[{index}]") for index, chunk in enumerate(datum.model_input)
    ]
    tokens = parts[0] if len(parts) == 1 else b"".join(parts)
    inputs = {
        name: _tensor(tensor, f"{where}.loss_fn_inputs[{name!r}]")
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(Tensor("int32", (len(tokens) // 4,), tokens), inputs)


def _chunk_tokens(chunk: wire.Chunk, where: str) -> bytes:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise UserError(f"{where} is {kind or 'of an unknown kind'}; only encoded_text is trained here")
    tokens = chunk.encoded_text.tokens
    if len(tokens) % 4:
        raise UserError(f"{where}.tokens has {len(tokens)} bytes, which is no whole number of int32")
    return tokens


def _tensor(tensor: wire.Tensor, where: str) -> Tensor:
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"{where} has dtype {tensor.dtype}; allowed are float32, int64 and int32")
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise UserError(f"{where} has shape {list(shape)}; sizes are not negative")
    if tensor.WhichOneof("encoding") == "sparse_csr":
        values = np.frombuffer(_whole(tensor.sparse_csr.values, dtype, where), dtype)
        crow = np.frombuffer(_whole(tensor.sparse_csr.crow_indices, np.dtype("<i8"), where), "<i8")
        col = np.frombuffer(_whole(tensor.sparse_csr.col_indices, np.dtype("<i8"), where), "<i8")
        return Tensor.of(_written_out(values, crow, col, shape, where))
    shape = shape or (len(tensor.dense) // dtype.itemsize,)
    if math.prod(shape) * dtype.itemsize != len(tensor.dense):
        raise UserError(
            f"{where} has {len(tensor.dense)} bytes; shape {list(shape)} of {dtype.name} "
            f"takes {math.prod(shape) * dtype.itemsize}"
        )
    if dtype.name == "int32":
        return Tensor.of(np.frombuffer(tensor.dense, dtype).astype(np.int64).reshape(shape))
    return Tensor(dtype.name, shape, tensor.dense)  # type: ignore[arg-type]


def _whole(data: bytes, dtype: np.dtype[np.generic], where: str) -> bytes:
    if len(data) % dtype.itemsize:
        raise UserError(f"{where} has {len(data)} bytes, which is no whole number of {dtype.name}")
    return data


def _written_out(
    values: NDArray[np.generic],
    crow: NDArray[np.int64],
    col: NDArray[np.int64],
    shape: tuple[int, ...],
    where: str,
) -> NDArray[np.generic]:
    """A sparse matrix (CSR) as a dense one; what is not listed is 0."""
    if len(shape) != 2:
        raise UserError(f"{where} is sparse and has shape {list(shape)}; sparse tensors have two dimensions")
    rows, columns = shape
    if rows * columns > _LARGEST_DENSE:
        raise UserError(f"{where} has shape {list(shape)}; at most {_LARGEST_DENSE} items are allowed")
    counts = np.diff(crow)
    if len(crow) != rows + 1 or crow[0] != 0 or (counts < 0).any() or crow[-1] != len(values):
        raise UserError(
            f"{where}: crow_indices must rise from 0 to the number of values in {rows + 1} entries"
        )
    if len(col) != len(values) or ((col < 0) | (col >= columns)).any():
        raise UserError(
            f"{where}: col_indices must name a column below {columns} for each of {len(values)} values"
        )
    dense = np.zeros((rows, columns), values.dtype)
    dense[np.repeat(np.arange(rows), counts), col] = values
    return dense.astype(np.int64) if dense.dtype == np.dtype("<i4") else dense


def _refuse_unknown(message: Message, where: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        numbers = ", ".join(str(unknown[index].field_number) for index in range(len(unknown)))
        raise UserError(f"{where} has fields that this server does not know (protobuf field {numbers})")


# ---------------------------------------------------------------------------- forward_backward, JSON


def pass_of_json(body: schemas.ForwardBackwardBody) -> Pass:
    """The operation of SDKs that do not send protobuf. Raises BadRequest and UserError."""
    given = body.forward_backward_input or body.forward_input
    if given is None:
        raise BadRequest("forward_backward_input is missing", param="forward_backward_input")
    data = []
    for index, datum in enumerate(given.data):
        where = f"data[{index}]"
        tokens = tokens_of(datum.model_input, f"{where}.model_input")
        inputs = {
            name: tensor_of(tensor, f"{where}.loss_fn_inputs[{name!r}]")
            for name, tensor in datum.loss_fn_inputs.items()
        }
        data.append(Datum(tokens, inputs))
    kind = ForwardBackward if body.forward_backward_input is not None else Forward
    return kind(data, given.loss_fn, dict(given.loss_fn_config or {}))


def tokens_of(model_input: schemas.ModelInput, where: str) -> Tensor:
    """Token ids of all chunks, int32. Raises UserError for what is not text."""
    tokens: list[int] = []
    for index, chunk in enumerate(model_input.chunks):
        if chunk.tokens is None or chunk.type not in (None, "encoded_text"):
            raise UserError(
                f"{where}.chunks[{index}] is {chunk.type or 'no text'}; only encoded_text is served here"
            )
        tokens += chunk.tokens
    try:
        return Tensor.of(np.array(tokens, dtype=np.int32))
    except OverflowError as error:
        raise UserError(f"{where} holds a token id that is no 32-bit integer") from error


def tensor_of(tensor: schemas.TensorData, where: str) -> Tensor:
    """A tensor of the JSON form. Raises UserError."""
    try:
        values = np.array(tensor.data, dtype=tensor.dtype)
        crow = np.array(tensor.sparse_crow_indices or [], dtype=np.int64)
        col = np.array(tensor.sparse_col_indices or [], dtype=np.int64)
    except (OverflowError, ValueError) as error:
        raise UserError(f"{where} holds a number that is no {tensor.dtype}") from error
    shape = tuple(tensor.shape) if tensor.shape is not None else values.shape
    if tensor.sparse_crow_indices is not None:
        return Tensor.of(_written_out(values, crow, col, shape, where))
    if math.prod(shape) != values.size or any(size < 0 for size in shape):
        raise UserError(f"{where} has {values.size} values; shape {list(shape)} takes {math.prod(shape)}")
    return Tensor.of(values.reshape(shape))


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


def require_adamw(config: schemas.OptimizerConfig | None) -> None:
    """Raises BadRequest for an optimizer that is not trained here."""
    if config is not None and config.type != "adamw":
        raise BadRequest(
            f"optimizer_config.type is {config.type[:40]!r}; allowed is adamw", param="optimizer_config"
        )


def optim_step_of(body: schemas.OptimStepBody) -> OptimStep:
    """The step; what is left out is the SDK's default. Raises UserError for another optimizer's parameters."""
    if body.optimizer_params is not None:
        family = body.optimizer_params.get("type")
        raise UserError(
            f"optimizer_params.type is {str(family)[:40]!r}; this run's optimizer is adamw: send adam_params"
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
    _refuse_unserved(body)
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
    )


def _refuse_unserved(body: schemas.SampleBody) -> None:
    """The one place where sampling options that are not served yet are refused."""
    for name in (
        "target_prompt_logprobs",
        "prompt_alt_tokens_k",
        "prompt_logprobs_last_n",
        "record_stability_info",
    ):
        if getattr(body, name):
            raise UserError(
                f"{name} is not served here; served are prompt_logprobs, topk_prompt_logprobs and topk_sample_logprobs"
            )
