"""What an operation or a sample request must satisfy, whatever the engine: checked before an engine sees it.

Every refusal is a UserError in the words of the Tinker API (`loss_fn`, `data[3].loss_fn_inputs['weights']`): which
field, what came, what is allowed. An engine may rely on all of it: tensors hold what their shapes say, tokens are in
the vocabulary, numbers are finite, sequences fit into the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

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
from engines.tensors import Tensor

MAX_SAMPLES = 1024
"""Largest `num_samples` of one request."""
MAX_STOPS = 64
"""Most stop strings of one request; as many token ids."""
MAX_STOP_LENGTH = 1024
"""Longest stop string, in characters."""

_LEAST_EPS = float(np.finfo(np.float32).tiny)
"""Below it, and above all at 0, a weight without gradient becomes 0 / 0."""
_LARGEST = 1e30
"""Beyond it, products leave float32's range."""
_STEP_LIMITS = {"learning_rate": 1e4, "weight_decay": 1e4, "grad_clip_norm": _LARGEST}
"""Largest settings of a step: so that their products, and quotients by 1 - beta, are float32 numbers."""
_LEAST_TEMPERATURE = 1e-6
"""Below it, dividing by the temperature leaves float32's range."""
_LONGEST_ECHO = 80
"""Characters of a sender's own words that an error repeats."""
_PER_TOKEN_BOUNDS = ("clip_low_threshold", "clip_high_threshold")


def check_operation(operation: Operation, info: EngineInfo) -> None:
    """Raises UserError if the operation cannot be honoured by an engine that is described by `info`."""
    match operation:
        case ForwardBackward() | Forward():
            _check_pass(operation, info)
        case OptimStep():
            _check_optim_step(operation)
        case CreateRun():
            _check_lora(operation.lora, info)
        case _:  # saving and loading name a folder that the gateway has chosen
            return


# ---------------------------------------------------------------------------- runs and steps


def _check_lora(lora: LoraSpec, info: EngineInfo) -> None:
    if not 1 <= lora.rank <= info.max_rank:
        raise UserError(
            f"lora_config.rank is {lora.rank}; {info.base_model} takes ranks from 1 to {info.max_rank}"
        )
    _check_number(
        "lora_config.alpha",
        lora.alpha,
        f"above 0 and at most {_LARGEST:g}",
        lambda value: 0 < value <= _LARGEST,
    )
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError(
            "lora_config: train_attn, train_mlp and train_unembed are all false, so there is nothing to train; "
            "at least one must be true"
        )
    if lora.train_unembed and not info.train_unembed:
        raise UserError(
            f"lora_config.train_unembed is true; this engine cannot adapt the unembedding of {info.base_model}. "
            "Create the run with train_unembed=False"
        )


def _check_optim_step(step: OptimStep) -> None:
    for name, most in _STEP_LIMITS.items():
        _check_range(f"adam_params.{name}", getattr(step, name), 0.0, most)
    for name in ("beta1", "beta2"):
        _check_number(
            f"adam_params.{name}", getattr(step, name), "at least 0 and below 1", lambda value: 0 <= value < 1
        )
    _check_range("adam_params.eps", step.eps, _LEAST_EPS, 1.0)


def _check_range(field: str, value: float, least: float, most: float) -> None:
    _check_number(
        field, value, f"at least {least:.2g} and at most {most:g}", lambda number: least <= number <= most
    )


def _check_number(field: str, value: float, allowed: str, holds: Callable[[float], bool]) -> None:
    if not (math.isfinite(value) and holds(value)):
        raise UserError(f"{field} is {value}; it must be a finite number, {allowed}")


# ---------------------------------------------------------------------------- forward and backward


def _check_pass(operation: Forward | ForwardBackward, info: EngineInfo) -> None:
    spec = LOSSES.get(operation.loss)
    if spec is None or operation.loss not in info.losses:
        raise UserError(
            f"loss_fn is {operation.loss[:_LONGEST_ECHO]!r}; this engine has {', '.join(info.losses)}"
        )
    _check_config(spec, operation.loss_config)
    if not operation.data:
        raise UserError("data is empty; at least one datum is needed")
    for index, datum in enumerate(operation.data):
        _check_datum(f"data[{index}]", datum, spec, info)


def _check_config(spec: LossSpec, config: LossConfig) -> None:
    for name, value in config.items():
        _check_setting(spec, name, value)
    complete = spec.with_defaults(config)
    for name in spec.settings:
        if name not in complete:
            raise UserError(f"loss_fn_config[{name!r}] is missing; {spec.name} has no default for it")
    _check_bounds(complete)


def _check_setting(spec: LossSpec, name: str, value: float | str) -> None:
    setting = spec.settings.get(name)
    if setting is None:
        allowed = ", ".join(spec.settings) or "no settings"
        raise UserError(f"loss_fn_config has {name[:_LONGEST_ECHO]!r}; {spec.name} takes {allowed}")
    if isinstance(value, str):
        raise UserError(
            f"loss_fn_config[{name!r}] is the text {value[:_LONGEST_ECHO]!r}; {spec.name} takes a number"
        )
    _check_range(f"loss_fn_config[{name!r}]", value, setting.least, _LARGEST)


def _check_bounds(config: Mapping[str, float]) -> None:
    low, high = (config.get(name, 0.0) for name in _PER_TOKEN_BOUNDS)
    if low > high:
        raise UserError(
            f"loss_fn_config: clip_low_threshold is {low:g} and clip_high_threshold is {high:g}; they bound the ratio "
            "itself (0.8 and 1.2 unless given), so the low one must not be above the high one"
        )


def _check_datum(where: str, datum: Datum, spec: LossSpec, info: EngineInfo) -> None:
    length = _check_tokens(f"{where}.model_input", datum.tokens, info)
    _check_names(where, datum, spec)
    targets = datum.loss_inputs["target_tokens"]
    _check_target_shape(where, targets, length, spec)
    for name in spec.inputs:
        tensor = datum.loss_inputs[name]
        field = f"{where}.loss_fn_inputs[{name!r}]"
        if tensor.shape != targets.shape:
            raise UserError(
                f"{field} has shape {list(tensor.shape)}, but its target_tokens has {list(targets.shape)}: "
                "they belong together item by item"
            )
        if name == "target_tokens":
            _check_vocabulary(field, _values(field, tensor, "int64"), info)
        else:
            _check_finite(field, _values(field, tensor, "float32"))


def _check_tokens(field: str, tokens: Tensor, info: EngineInfo) -> int:
    """The number of tokens of a sequence that the model can take."""
    if len(tokens.shape) != 1:
        raise UserError(f"{field} has shape {list(tokens.shape)}; tokens are one list")
    (length,) = tokens.shape
    if length < 1:
        raise UserError(f"{field} is empty; at least one token is needed")
    if length > info.max_context:
        raise UserError(f"{field} has {length} tokens; {info.base_model} takes at most {info.max_context}")
    _check_vocabulary(field, _values(field, tokens, "int32"), info)
    return length


def _check_names(where: str, datum: Datum, spec: LossSpec) -> None:
    needed = ", ".join(spec.inputs)
    for name in spec.inputs:
        if name not in datum.loss_inputs:
            raise UserError(f"{where}.loss_fn_inputs has no {name!r}; {spec.name} needs {needed}")
    if len(datum.loss_inputs) == len(spec.inputs):
        return
    for name in datum.loss_inputs:
        if name in spec.inputs:
            continue
        hint = "; give it as a number in loss_fn_config" if name in _PER_TOKEN_BOUNDS else ""
        raise UserError(
            f"{where}.loss_fn_inputs has {name!r}, which {spec.name} does not take: it takes {needed}{hint}"
        )


def _check_target_shape(where: str, targets: Tensor, length: int, spec: LossSpec) -> None:
    shape = targets.shape
    if shape == (length,) or (spec.many_targets and len(shape) == 2 and shape[0] == length and shape[1] >= 1):
        return
    allowed = f"[{length}] or [{length}, K] with K at least 1" if spec.many_targets else f"[{length}]"
    raise UserError(
        f"{where}.loss_fn_inputs['target_tokens'] has shape {list(shape)}, but its model_input has {length} tokens: "
        f"{spec.name} takes {allowed}"
    )


# ---------------------------------------------------------------------------- tensors


def _values(field: str, tensor: Tensor, dtype: str) -> NDArray[Any]:
    """The items of a tensor that must have this dtype; read-only, of its shape."""
    if tensor.dtype != dtype:
        raise UserError(f"{field} has dtype {tensor.dtype}; it must be {dtype}")
    expected = math.prod(tensor.shape) * (8 if dtype == "int64" else 4)
    if min(tensor.shape, default=0) < 0 or len(tensor.data) != expected:
        raise UserError(
            f"{field} holds {len(tensor.data)} bytes, but shape {list(tensor.shape)} of {dtype} takes {expected}"
        )
    return tensor.array()


def _check_vocabulary(field: str, tokens: NDArray[Any], info: EngineInfo) -> None:
    """Seen as unsigned numbers, negative ids are the largest: one comparison finds both kinds of wrong ones."""
    unsigned: NDArray[Any] = tokens.view(np.uint32 if tokens.itemsize == 4 else np.uint64)
    if int(unsigned.max()) < info.vocab_size:
        return
    place = _first(unsigned >= info.vocab_size)
    token = int(tokens[place])
    advice = "; to leave a position out, give it weight 0 and any token" if token == -100 else ""
    raise UserError(f"{field}{list(place)} is {token}; {_vocabulary(info)}{advice}")


def _vocabulary(info: EngineInfo) -> str:
    return f"the tokens of {info.base_model} are 0 to {info.vocab_size - 1}"


def _check_finite(field: str, values: NDArray[Any]) -> None:
    held = np.abs(values) <= _LARGEST  # false for NaN as well
    if not held.all():
        place = _first(~held)
        raise UserError(
            f"{field}{list(place)} is {float(values[place]):g}; all its numbers must be finite, from {-_LARGEST:g} to "
            f"{_LARGEST:g}"
        )


def _first(mask: NDArray[Any]) -> tuple[int, ...]:
    """Index of the first true item."""
    return tuple(int(axis) for axis in np.unravel_index(int(mask.argmax()), mask.shape))


# ---------------------------------------------------------------------------- samples


def check_sample(request: SampleRequest, info: EngineInfo) -> None:
    """Raises UserError if the request cannot be honoured by an engine that is described by `info`."""
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise UserError(f"num_samples is {request.num_samples}; it must be from 1 to {MAX_SAMPLES}")
    _check_room(request, _check_tokens("prompt", request.prompt, info), info)
    _check_drawing(request)
    _check_stops(request, info)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        count = cast(int, getattr(request, name))
        if not 0 <= count <= info.max_top_logprobs:
            raise UserError(f"{name} is {count}; it must be from 0 to {info.max_top_logprobs}")


def _check_room(request: SampleRequest, length: int, info: EngineInfo) -> None:
    wanted = request.max_tokens
    if wanted is None:
        if length >= info.max_context:
            raise UserError(
                f"the prompt has {length} tokens; {info.base_model} takes at most {info.max_context} with what is "
                "sampled, so there is room for none"
            )
        return
    if wanted < 1:
        raise UserError(f"sampling_params.max_tokens is {wanted}; it must be at least 1")
    if length + wanted > info.max_context:
        raise UserError(
            f"the prompt has {length} tokens and sampling_params.max_tokens is {wanted}, together {length + wanted}; "
            f"{info.base_model} takes at most {info.max_context}"
        )


def _check_drawing(request: SampleRequest) -> None:
    _check_number(
        "sampling_params.temperature",
        request.temperature,
        f"0 for the most likely token, or from {_LEAST_TEMPERATURE:g} to {_LARGEST:g}",
        lambda value: value == 0 or _LEAST_TEMPERATURE <= value <= _LARGEST,
    )
    _check_number(
        "sampling_params.top_p", request.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1
    )
    if request.top_k != -1 and request.top_k < 1:
        raise UserError(
            f"sampling_params.top_k is {request.top_k}; it must be at least 1, or -1 for no limit"
        )


def _check_stops(request: SampleRequest, info: EngineInfo) -> None:
    count = max(len(request.stop_strings), len(request.stop_tokens))
    if count > MAX_STOPS:
        raise UserError(f"sampling_params.stop has {count} entries; at most {MAX_STOPS} are taken")
    for token in request.stop_tokens:
        if not 0 <= token < info.vocab_size:
            raise UserError(f"sampling_params.stop holds the token {token}; {_vocabulary(info)}")
    for string in request.stop_strings:
        if not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise UserError(
                f"sampling_params.stop holds a text of {len(string)} characters; 1 to {MAX_STOP_LENGTH} are allowed"
            )
