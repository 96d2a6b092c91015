"""What single fields must satisfy, of operations and of samples; each refusal is a UserError naming the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.interface import EngineInfo, UserError
from engines.tensors import Tensor

LARGEST = 1e30
"""Beyond it, products leave float32's range."""


def check_number(field: str, value: float, allowed: str, holds: Callable[[float], bool]) -> None:
    if not (math.isfinite(value) and holds(value)):
        raise UserError(f"{field} is {value}; it must be a finite number, {allowed}")


def check_range(field: str, value: float, least: float, most: float) -> None:
    check_number(
        field, value, f"at least {least:.2g} and at most {most:g}", lambda number: least <= number <= most
    )


def check_tokens(field: str, tokens: Tensor, info: EngineInfo) -> int:
    """The number of tokens of a sequence that the model can take."""
    if len(tokens.shape) != 1:
        raise UserError(f"{field} has shape {list(tokens.shape)}; tokens are one list")
    (length,) = tokens.shape
    if length < 1:
        raise UserError(f"{field} is empty; at least one token is needed")
    if length > info.max_context:
        raise UserError(f"{field} has {length} tokens; {info.base_model} takes at most {info.max_context}")
    check_vocabulary(field, values_of(field, tokens, "int32"), info)
    return length


def values_of(field: str, tensor: Tensor, dtype: str) -> NDArray[Any]:
    """The items of a tensor that must have this dtype; read-only, of its shape."""
    if tensor.dtype != dtype:
        raise UserError(f"{field} has dtype {tensor.dtype}; it must be {dtype}")
    expected = math.prod(tensor.shape) * (8 if dtype == "int64" else 4)
    if min(tensor.shape, default=0) < 0 or len(tensor.data) != expected:
        raise UserError(
            f"{field} holds {len(tensor.data)} bytes, but shape {list(tensor.shape)} of {dtype} takes {expected}"
        )
    return tensor.array()


def check_vocabulary(field: str, tokens: NDArray[Any], info: EngineInfo) -> None:
    """Seen as unsigned numbers, negative ids are the largest: one comparison finds both kinds of wrong ones."""
    unsigned: NDArray[Any] = tokens.view(np.uint32 if tokens.itemsize == 4 else np.uint64)
    if int(unsigned.max()) < info.vocab_size:
        return
    place = first_true(unsigned >= info.vocab_size)
    token = int(tokens[place])
    advice = "; to leave a position out, give it weight 0 and any token" if token == -100 else ""
    raise UserError(f"{field}{list(place)} is {token}; {vocabulary_of(info)}{advice}")


def vocabulary_of(info: EngineInfo) -> str:
    return f"the tokens of {info.base_model} are 0 to {info.vocab_size - 1}"


def check_finite(field: str, values: NDArray[Any]) -> None:
    held = np.abs(values) <= LARGEST  # false for NaN as well
    if not held.all():
        place = first_true(~held)
        raise UserError(
            f"{field}{list(place)} is {float(values[place]):g}; all its numbers must be finite, from {-LARGEST:g} to "
            f"{LARGEST:g}"
        )


def first_true(mask: NDArray[Any]) -> tuple[int, ...]:
    """Index of the first true item."""
    return tuple(int(axis) for axis in np.unravel_index(int(mask.argmax()), mask.shape))
