"""What an operation must satisfy, whatever the engine: checked before an engine sees it.

Every refusal is a UserError in the words of the Tinker API (`loss_fn`, `data[3].loss_fn_inputs['weights']`): which
field, what came, what is allowed. An engine may rely on all of it: tensors hold what their shapes say, tokens are in
the vocabulary, numbers are finite, sequences fit into the context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.fields import (
    LARGEST,
    check_finite,
    check_number,
    check_range,
    check_tokens,
    check_vocabulary,
    first_true,
    values_of,
)
from engines.graphs import CustomLoss, GraphInput
from engines.interface import EngineInfo, UserError
from engines.losses import CUSTOM, HIGH, LOSSES, LOW, UNKNOWN_FORMULA, LossSpec
from engines.losses.graph import check_graph
from engines.operations import (
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    LoraSpec,
    LossConfig,
    Operation,
    OptimStep,
)
from engines.tensors import Tensor

_LEAST_EPS = float(np.finfo(np.float32).tiny)
"""Below it, and above all at 0, a weight without gradient becomes 0 / 0."""
_STEP_LIMITS = {"learning_rate": 1e4, "weight_decay": 1e4, "grad_clip_norm": LARGEST}
"""Largest settings of a step: so that their products, and quotients by 1 - beta, are float32 numbers."""
_LONGEST_ECHO = 80
"""Characters of a sender's own words that an error repeats."""


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
    check_number(
        "lora_config.alpha",
        lora.alpha,
        f"above 0 and at most {LARGEST:g}",
        lambda value: 0 < value <= LARGEST,
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
        check_range(f"adam_params.{name}", getattr(step, name), 0.0, most)
    for name in ("beta1", "beta2"):
        check_number(
            f"adam_params.{name}", getattr(step, name), "at least 0 and below 1", lambda value: 0 <= value < 1
        )
    check_range("adam_params.eps", step.eps, _LEAST_EPS, 1.0)


# ---------------------------------------------------------------------------- forward and backward


def _check_pass(operation: Forward | ForwardBackward, info: EngineInfo) -> None:
    if operation.loss == CUSTOM and CUSTOM in info.losses:
        _check_custom_pass(operation, info)
        return
    spec = LOSSES.get(operation.loss)
    if spec is None or operation.loss not in info.losses:
        raise UserError(_no_such_loss(operation.loss, info))
    settings = _checked_settings(spec, operation.loss_config)
    if not operation.data:
        raise UserError("data is empty; at least one datum is needed")
    for index, datum in enumerate(operation.data):
        _check_datum(f"data[{index}]", datum, spec, info)
        _check_tokenwise(f"data[{index}].loss_fn_inputs", datum, spec, settings)


def _check_custom_pass(operation: Forward | ForwardBackward, info: EngineInfo) -> None:
    if operation.custom is None:
        raise UserError(
            "loss_fn is 'custom', and loss_fn_config['loss_id'] names no loss that has been created"
        )
    check_graph(operation.custom)
    if not operation.data:
        raise UserError("data is empty; at least one datum is needed")
    for index, datum in enumerate(operation.data):
        _check_custom_datum(f"data[{index}]", datum, operation.custom, info)


def _check_custom_datum(where: str, datum: Datum, loss: CustomLoss, info: EngineInfo) -> None:
    """Other loss inputs than those that the loss reads are let be: a client sends its data as they are."""
    length = check_tokens(f"{where}.model_input", datum.tokens, info)
    targets = datum.loss_inputs.get("target_tokens")
    if targets is None:
        raise UserError(f"{where}.loss_fn_inputs has no 'target_tokens', whose log-probs the loss takes")
    field = f"{where}.loss_fn_inputs['target_tokens']"
    rank = loss.inputs[0].rank
    if len(targets.shape) != rank or targets.shape[0] != length or min(targets.shape) < 1:
        allowed = f"[{length}]" if rank == 1 else f"[{length}, K] with K at least 1"
        raise UserError(
            f"{field} has shape {list(targets.shape)}; the model_input has {length} tokens, and loss "
            f"{loss.name[:_LONGEST_ECHO]!r} declares logprobs with rank {rank}: it takes {allowed}"
        )
    check_vocabulary(field, values_of(field, targets, "int64"), info)
    for entry in loss.inputs[1:]:
        _check_custom_input(where, datum, loss, entry)


def _check_custom_input(where: str, datum: Datum, loss: CustomLoss, entry: GraphInput) -> None:
    name = loss.name[:_LONGEST_ECHO]
    tensor = datum.loss_inputs.get(entry.name)
    if tensor is None:
        raise UserError(f"{where}.loss_fn_inputs has no {entry.name!r}, which loss {name!r} takes")
    field = f"{where}.loss_fn_inputs[{entry.name!r}]"
    if tensor.dtype not in ("float32", "int64"):
        raise UserError(f"{field} has dtype {tensor.dtype}; it must be float32 or int64")
    values_of(field, tensor, tensor.dtype)
    # a tensor without dimensions comes as one with one number: protobuf cannot tell them apart
    scalar = entry.rank == 0 and tensor.shape in ((), (1,))
    if len(tensor.shape) != entry.rank and not scalar:
        raise UserError(
            f"{field} has shape {list(tensor.shape)}, but loss {name!r} declares it with rank {entry.rank}"
        )


def _no_such_loss(loss: str, info: EngineInfo) -> str:
    if loss in UNKNOWN_FORMULA:
        others = [name for name in info.losses if name in LOSSES and "advantages" in LOSSES[name].inputs]
        return (
            f"loss_fn is {loss!r}, whose formula is not public, so it is not served here; pass "
            f"loss_fn={' or '.join(others)} instead"
        )
    hint = (
        "; a loss in Python, given to forward_backward_custom, runs on the client" if loss == CUSTOM else ""
    )
    return f"loss_fn is {loss[:_LONGEST_ECHO]!r}; this engine has {', '.join(info.losses)}{hint}"


def _checked_settings(spec: LossSpec, config: LossConfig) -> dict[str, float]:
    """The settings with their defaults; those that a datum may bring can be missing."""
    for name, value in config.items():
        _check_setting(spec, name, value)
    settings = spec.with_defaults(config)
    for name in spec.settings:
        if name not in settings and name not in spec.per_token:
            raise UserError(f"loss_fn_config[{name!r}] is missing; {spec.name} has no default for it")
    low, high = settings.get(LOW, 0.0), settings.get(HIGH, math.inf)
    if low > high:
        raise UserError(
            f"loss_fn_config: {LOW} is {low:g} and {HIGH} is {high:g}; they bound the ratio itself "
            "(0.8 and 1.2 unless given), so the low one must not be above the high one"
        )
    return settings


def _check_setting(spec: LossSpec, name: str, value: float | str) -> None:
    setting = spec.settings.get(name)
    if setting is None:
        allowed = ", ".join(spec.settings) or "no settings"
        raise UserError(f"loss_fn_config has {name[:_LONGEST_ECHO]!r}; {spec.name} takes {allowed}")
    if isinstance(value, str):
        raise UserError(
            f"loss_fn_config[{name!r}] is the text {value[:_LONGEST_ECHO]!r}; {spec.name} takes a number"
        )
    check_range(f"loss_fn_config[{name!r}]", value, setting.least, LARGEST)


def _check_datum(where: str, datum: Datum, spec: LossSpec, info: EngineInfo) -> None:
    length = check_tokens(f"{where}.model_input", datum.tokens, info)
    _check_names(where, datum, spec)
    targets = datum.loss_inputs["target_tokens"]
    _check_target_shape(where, targets, length, spec)
    for name, tensor in datum.loss_inputs.items():
        field = f"{where}.loss_fn_inputs[{name!r}]"
        if tensor.shape != targets.shape:
            raise UserError(
                f"{field} has shape {list(tensor.shape)}, but its target_tokens has {list(targets.shape)}: "
                "they belong together item by item"
            )
        if name == "target_tokens":
            check_vocabulary(field, values_of(field, tensor, "int64"), info)
        else:
            check_finite(field, values_of(field, tensor, "float32"))


def _check_tokenwise(where: str, datum: Datum, spec: LossSpec, settings: Mapping[str, float]) -> None:
    """What holds between settings that are given for each token, and for the marks of a sequence."""
    if spec.per_sequence and not datum.loss_inputs["sequence_ratio_mask"].array().any():
        raise UserError(
            f"{where}['sequence_ratio_mask'] is 0 everywhere; the ratio of the sequence is a mean over the tokens that "
            "it marks, so it must mark at least one"
        )
    given: dict[str, NDArray[Any]] = {
        name: datum.loss_inputs[name].array() for name in spec.per_token if name in datum.loss_inputs
    }
    for name in spec.per_token:
        if name not in given and name not in settings:
            raise UserError(
                f"loss_fn_config[{name!r}] is missing; {spec.name} has no default for it, and {where} has none either"
            )
    for name, values in given.items():
        least = spec.settings[name].least
        if (values < least).any():
            place = first_true(values < least)
            raise UserError(
                f"{where}[{name!r}]{list(place)} is {float(values[place]):g}; it must be at least {least:g}"
            )
    if given:
        low, high = (given.get(name, np.float32(settings.get(name, 0.0))) for name in (LOW, HIGH))
        crossed = np.atleast_1d(low > high)
        if crossed.any():
            place = first_true(crossed)
            raise UserError(f"{where}: {LOW} is above {HIGH} at {list(place)}; they bound the ratio itself")


def _check_names(where: str, datum: Datum, spec: LossSpec) -> None:
    needed = ", ".join(spec.inputs)
    for name in spec.inputs:
        if name not in datum.loss_inputs:
            raise UserError(f"{where}.loss_fn_inputs has no {name!r}; {spec.name} needs {needed}")
    if len(datum.loss_inputs) == len(spec.inputs):
        return
    for name in datum.loss_inputs:
        if name not in spec.inputs and name not in spec.per_token:
            allowed = ", ".join((*spec.inputs, *spec.per_token))
            raise UserError(
                f"{where}.loss_fn_inputs has {name[:_LONGEST_ECHO]!r}, which {spec.name} does not take: it takes "
                f"{allowed}"
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
