"""What an operation or a sample request must satisfy before any engine sees it.

Each check raises UserError with a sentence for the person who sent the request: which field, under its name in the
Tinker API, what it holds, and what is allowed. Nothing is repaired or left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.interface import EngineInfo, UserError
from engines.losses import LOSSES, LossSpec
from engines.operations import (
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    LoraSpec,
    LossConfig,
    Operation,
    OptimStep,
    SampleRequest,
)
from engines.tensors import DType, Tensor

MAX_SAMPLES = 1024
MAX_STOP_STRINGS = 64

_ITEM_BYTES: dict[DType, int] = {"int32": 4, "int64": 8, "float32": 4}
_TARGETS = "target_tokens"


def check_operation(operation: Operation, info: EngineInfo) -> None:
    """Raises UserError when the operation asks for what is wrong in itself or beyond this engine's limits."""
    if isinstance(operation, CreateRun):
        _check_lora(operation.lora, info)
    elif isinstance(operation, (Forward, ForwardBackward)):
        _check_pass(operation, info)
    elif isinstance(operation, OptimStep):
        _check_step(operation)


# ---------------------------------------------------------------------------- create_run


def _check_lora(lora: LoraSpec, info: EngineInfo) -> None:
    if not 1 <= lora.rank <= info.max_rank:
        raise UserError(f"lora_config.rank is {lora.rank}; allowed are 1 to {info.max_rank}")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise UserError(f"the adapter's alpha is {lora.alpha}; it must be a finite number above 0")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError(
            "lora_config: train_attn, train_mlp and train_unembed are all false, so that there is nothing to train; "
            "set at least one of them"
        )
    if lora.train_unembed and not info.train_unembed:
        raise UserError(
            f"lora_config.train_unembed is true, but {info.base_model} is served by an engine that trains no adapter on "
            "the unembedding; set it to false"
        )


# ---------------------------------------------------------------------------- forward, forward_backward


def _check_pass(operation: Forward | ForwardBackward, info: EngineInfo) -> None:
    if operation.loss not in info.losses or operation.loss not in LOSSES:
        known = ", ".join(name for name in info.losses if name in LOSSES)
        raise UserError(f"loss_fn is {operation.loss[:80]!r}; {info.base_model} is trained with {known}")
    spec = LOSSES[operation.loss]
    _check_config(spec, operation.loss_config)
    if not operation.data:
        raise UserError("data is empty; at least one datum is needed")
    for index, datum in enumerate(operation.data):
        _check_datum(datum, f"data[{index}]", spec, info)


def _check_config(spec: LossSpec, config: LossConfig) -> None:
    for name in config:
        if name not in spec.settings:
            known = ", ".join(spec.settings) or "none"
            raise UserError(f"loss_fn_config has {name[:80]!r}; the settings of {spec.name} are: {known}")
    for name, setting in spec.settings.items():
        where = f"loss_fn_config[{name!r}]"
        value = config.get(name, setting.default)
        if value is None:
            raise UserError(f"{where} is missing; {spec.name} has no default for it")
        if isinstance(value, str):
            raise UserError(f"{where} is the text {value[:80]!r}; it must be a number")
        if not (math.isfinite(value) and value >= setting.least):
            raise UserError(f"{where} is {value}; it must be a finite number of at least {setting.least:g}")
    if "clip_low_threshold" in spec.settings:
        bounds = spec.with_defaults(config)
        low, high = bounds["clip_low_threshold"], bounds["clip_high_threshold"]
        if low > high:
            raise UserError(
                f"loss_fn_config['clip_low_threshold'] is {low}, loss_fn_config['clip_high_threshold'] is {high}; both "
                "bound the probability ratio itself (defaults 0.8 and 1.2), so the first must not exceed the second"
            )


def _check_datum(datum: Datum, where: str, spec: LossSpec, info: EngineInfo) -> None:
    tokens = f"{where}.model_input"
    _check_tensor(datum.tokens, tokens, "int32")
    if len(datum.tokens.shape) != 1:
        raise UserError(f"{tokens} has shape {list(datum.tokens.shape)}; it must have one dimension")
    length = datum.tokens.shape[0]
    if length == 0:
        raise UserError(f"{tokens} is empty; at least one token is needed")
    if length > info.max_context:
        raise UserError(f"{tokens} has {length} tokens; {info.base_model} takes at most {info.max_context}")
    _check_names(datum, where, spec)
    targets = datum.loss_inputs[_TARGETS]
    _check_targets(targets, f"{where}.loss_fn_inputs['{_TARGETS}']", length, spec, info)
    _check_tokens(datum.tokens.array(), tokens, info)
    for name, tensor in datum.loss_inputs.items():
        if name != _TARGETS:
            _check_numbers(tensor, f"{where}.loss_fn_inputs[{name!r}]", targets.shape)


def _check_names(datum: Datum, where: str, spec: LossSpec) -> None:
    needed = ", ".join(spec.inputs)
    for name in spec.inputs:
        if name not in datum.loss_inputs:
            raise UserError(f"{where}.loss_fn_inputs[{name!r}] is missing; {spec.name} needs {needed}")
    if len(datum.loss_inputs) > len(spec.inputs):
        odd = next(name for name in datum.loss_inputs if name not in spec.inputs)
        raise UserError(f"{where}.loss_fn_inputs has {odd[:80]!r}; {spec.name} takes only {needed}")


def _check_targets(targets: Tensor, where: str, length: int, spec: LossSpec, info: EngineInfo) -> None:
    _check_tensor(targets, where, "int64")
    axes = len(targets.shape)
    if axes not in ((1, 2) if spec.many_targets else (1,)) or targets.shape[0] != length:
        allowed = f"[{length}] or [{length}, K]" if spec.many_targets else f"[{length}]"
        raise UserError(
            f"{where} has shape {list(targets.shape)}, the model_input {length} tokens; with {spec.name} the shape must "
            f"be {allowed}: position i of the input predicts target i"
        )
    if axes == 2 and targets.shape[1] == 0:
        raise UserError(
            f"{where} has shape {list(targets.shape)}; at least one target for each token is needed"
        )
    _check_tokens(targets.array(), where, info)


def _check_numbers(tensor: Tensor, where: str, shape: tuple[int, ...]) -> None:
    """A float32 tensor of the targets' shape, finite throughout."""
    _check_tensor(tensor, where, "float32")
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {list(tensor.shape)}, its {_TARGETS} has {list(shape)}; both must have the same shape"
        )
    values = tensor.array()
    if not np.isfinite(values).all():
        place = _first(~np.isfinite(values))
        raise UserError(f"{where}{list(place)} is {values[place]}; only finite numbers are allowed")


def _check_tensor(tensor: Tensor, where: str, dtype: DType) -> None:
    """Its dtype, and that it holds as many bytes as its shape takes."""
    if tensor.dtype != dtype:
        raise UserError(f"{where} has dtype {tensor.dtype}; it must be {dtype}")
    if any(size < 0 for size in tensor.shape):
        raise UserError(f"{where} has shape {list(tensor.shape)}; sizes must not be negative")
    expected = math.prod(tensor.shape) * _ITEM_BYTES[dtype]
    if len(tensor.data) != expected:
        raise UserError(
            f"{where} has {len(tensor.data)} bytes; shape {list(tensor.shape)} of {dtype} takes {expected}"
        )


def _check_tokens(tokens: NDArray[np.generic], where: str, info: EngineInfo) -> None:
    """Every item is a token id. Seen as unsigned, negative ids are large ones, so that one pass tells."""
    unsigned = tokens.view(f"<u{tokens.itemsize}")
    if int(unsigned.max()) < info.vocab_size:
        return
    place = _first(unsigned >= info.vocab_size)
    token = int(tokens[place].item())
    advice = "; to ignore a position, give it weight 0 and any valid target" if token == -100 else ""
    raise UserError(
        f"{where}{list(place)} is {token}; token ids of {info.base_model} are 0 to {info.vocab_size - 1}{advice}"
    )


def _first(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first true item."""
    return tuple(int(axis) for axis in np.unravel_index(int(mask.argmax()), mask.shape))


# ---------------------------------------------------------------------------- optim_step


def _check_step(step: OptimStep) -> None:
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value: float = getattr(step, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"adam_params.{name} is {value}; it must be a finite number of at least 0")
    for name in ("beta1", "beta2"):
        beta: float = getattr(step, name)
        if not 0 <= beta < 1:
            raise UserError(f"adam_params.{name} is {beta}; it must be at least 0 and below 1")


# ---------------------------------------------------------------------------- sample


def check_sample(request: SampleRequest, info: EngineInfo) -> None:
    """Raises UserError when the request asks for what is wrong in itself or beyond this engine's limits."""
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise UserError(f"num_samples is {request.num_samples}; allowed are 1 to {MAX_SAMPLES}")
    _check_drawing(request)
    _check_prompt(request, info)
    _check_stops(request.stop_strings, request.stop_tokens, info)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        count: int = getattr(request, name)
        if not 0 <= count <= info.max_top_logprobs:
            raise UserError(f"{name} is {count}; allowed are 0 to {info.max_top_logprobs}")


def _check_drawing(request: SampleRequest) -> None:
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise UserError(
            f"sampling_params.temperature is {request.temperature}; it must be a finite number of at least 0 "
            "(0 always takes the likeliest token)"
        )
    if request.top_k != -1 and request.top_k < 1:
        raise UserError(f"sampling_params.top_k is {request.top_k}; allowed are -1 (off) and 1 or more")
    if not 0 < request.top_p <= 1:
        raise UserError(f"sampling_params.top_p is {request.top_p}; it must be above 0 and at most 1")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise UserError(f"sampling_params.max_tokens is {request.max_tokens}; it must be at least 1")


def _check_prompt(request: SampleRequest, info: EngineInfo) -> None:
    _check_tensor(request.prompt, "prompt", "int32")
    if len(request.prompt.shape) != 1:
        raise UserError(f"prompt has shape {list(request.prompt.shape)}; it must have one dimension")
    length = request.prompt.shape[0]
    if length == 0:
        raise UserError("prompt is empty; at least one token is needed")
    if length + (request.max_tokens or 1) > info.max_context:
        wanted = (
            "leave no room for another"
            if request.max_tokens is None
            else f"and sampling_params.max_tokens of {request.max_tokens} exceed it"
        )
        raise UserError(
            f"{info.base_model} takes at most {info.max_context} tokens; the prompt's {length} tokens {wanted}"
        )
    _check_tokens(request.prompt.array(), "prompt", info)


def _check_stops(strings: Sequence[str], tokens: Sequence[int], info: EngineInfo) -> None:
    if len(strings) > MAX_STOP_STRINGS:
        raise UserError(
            f"sampling_params.stop has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed"
        )
    if "" in strings:
        raise UserError("sampling_params.stop holds an empty string, which every text contains; leave it out")
    for token in tokens:
        if not 0 <= token < info.vocab_size:
            raise UserError(
                f"sampling_params.stop holds token {token}; token ids of {info.base_model} are 0 to "
                f"{info.vocab_size - 1}"
            )
