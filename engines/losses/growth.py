"""What a call of a traced loss will take, found before it is made; and the limits that it is held to.

Both limits follow from shapes alone, never from a clock, so that a replay comes to the same decision. A datum's results
together hold at most `MAX_ELEMENTS` numbers: that bounds memory, since all of them are kept for the gradient. Work is
counted for the whole operation, in something like nanoseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.interface import UserError
from engines.losses.allowed import Growth

MAX_ELEMENTS = 2**27
"""Numbers that the results of one datum's graph hold together; a matrix of all pairs of 4,096 tokens is an eighth."""
MAX_WORK = 2**34
"""Work of one operation: some tens of seconds on one core."""

_CALL = 5_000
"""Work of any call, however little it computes."""
_PIECE = 128
"""A tensor object weighs as much as so many numbers."""
_PER_ELEMENT = {Growth.SORTING: 64, Growth.POINTWISE: 4}

Arguments = Sequence[Any]
Keywords = Mapping[str, Any]
Function = Callable[..., Any]


class Allowance:
    """What an operation may still do, and the datum at hand."""

    def __init__(self) -> None:
        self._work = MAX_WORK
        self._elements = MAX_ELEMENTS

    def begin_datum(self) -> None:
        """What was computed for the datum before has been freed."""
        self._elements = MAX_ELEMENTS

    def take(self, elements: int, work: int) -> None:
        """Raises UserError when the call would go beyond what is left."""
        self._elements -= elements
        if self._elements < 0:
            raise UserError(
                f"the values of one datum would hold more than {MAX_ELEMENTS} numbers together; a loss may not"
            )
        self._work -= work + _CALL
        if self._work < 0:
            raise UserError("the loss takes too long on this many data; send fewer at a time, or simplify it")


def charge(
    allowance: Allowance, growth: Growth, function: Function, args: Arguments, kwargs: Keywords
) -> None:
    """Take what the call needs. Raises UserError."""
    tensors = list(tensors_of((args, kwargs)))
    if not tensors or growth is Growth.VIEW:
        allowance.take(0, 0)
        return
    call = Call(function, args, kwargs, tensors)
    elements = _RULES[growth](call)
    work = _sums_of_products(call, elements) if growth is Growth.CONTRACTION else 0
    allowance.take(elements, max(work, elements * _PER_ELEMENT.get(growth, 2)))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_of(inner)
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))


class Call(NamedTuple):
    """A call that is to be made; `tensors` are all those in its arguments, one at least."""

    function: Function
    args: Arguments
    kwargs: Keywords
    tensors: list[Tensor]

    def given(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by place or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


# ---------------------------------------------------------------------------- at most so many numbers come out


def _size(tensor: Tensor) -> int:
    """Its number of items; in Python's integers, which do not wrap around."""
    return math.prod(tensor.shape)


def _together(call: Call) -> int:
    return sum(map(_size, call.tensors))


def _broadcast(call: Call) -> int:
    rank = max(tensor.ndim for tensor in call.tensors)
    shapes = [(1,) * (rank - tensor.ndim) + tuple(tensor.shape) for tensor in call.tensors]
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _dry(call: Call) -> int:
    """Make the call with tensors that have shapes and no memory."""
    result = call.function(*_without_memory(call.args), **_without_memory(call.kwargs))
    return sum(map(_size, tensors_of(result)))


def _without_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (list, tuple)):
        filled = [_without_memory(inner) for inner in value]
        return filled if isinstance(value, list) else tuple(filled)
    if isinstance(value, Mapping):
        return {name: _without_memory(inner) for name, inner in value.items()}
    return value


def _contracted(call: Call) -> int:
    if (
        call.function is torch.einsum and len(call.tensors) > 2
    ):  # the first two are multiplied before the rest
        return math.prod(map(_size, call.tensors))
    return _dry(call)


def _sums_of_products(call: Call, elements: int) -> int:
    """Multiplications: those of [n, k] and [k, m] are the root of nk * km * nm."""
    largest = sorted(map(_size, call.tensors))[-2:]
    return max(sum(largest), math.isqrt(math.prod(largest) * elements))


def _pieces(call: Call) -> int:
    return _together(call) + _PIECE * max(max(tensor.shape, default=1) for tensor in call.tensors)


def _places(call: Call) -> int:
    return max(_broadcast(call), *(_size(tensor) * max(tensor.ndim, 1) for tensor in call.tensors))


def _indexed(call: Call) -> int:
    """Slices copy nothing; marks choose among what is there; places may name the same one again and again."""
    source, index = call.args[0], call.args[1]
    if not isinstance(source, Tensor):
        return 0
    picks = call.tensors[1:]
    if not picks and not _holds_list(index):
        return 0
    if any(pick.dtype == torch.bool for pick in picks):
        return _size(source) * math.prod(_size(pick) for pick in picks if pick.dtype != torch.bool)
    return _dry(call)


def _holds_list(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) for part in parts)


def _repeated(call: Call) -> int:
    source = call.given(0, "input")
    repeats = call.given(1, "repeats", source)
    if not isinstance(repeats, Tensor):
        return _size(source) * max(int(repeats), 0)
    most = max(int(repeats.max()), 0) if _size(repeats) else 0
    return most * max(_size(source), _size(repeats))


def _one_hot(call: Call) -> int:
    places = call.given(0, "tensor")
    classes = call.given(1, "num_classes", -1)
    if classes < 0:
        classes = int(places.max()) + 1 if _size(places) else 0
    return _size(places) * max(int(classes), 0)


def _vectors(call: Call) -> int:
    """Norms of matrices are found by decompositions, whose cost is another."""
    kind, dim = call.given(1, "p", "fro"), call.given(2, "dim")
    if kind not in ("fro", None) and not isinstance(kind, (int, float)):
        raise UserError(
            f"the kind of norm {str(kind)[:80]!r} is not among what a loss may call on the server"
        )
    if isinstance(dim, (list, tuple)) and len(dim) > 1:
        raise UserError(
            "a norm over several dimensions at once is not among what a loss may call on the server"
        )
    return _together(call)


_RULES: dict[Growth, Callable[[Call], int]] = {
    Growth.POINTWISE: _broadcast,
    Growth.BOUNDED: _together,
    Growth.SORTING: _together,
    Growth.SHAPED: _dry,
    Growth.CONTRACTION: _contracted,
    Growth.PIECES: _pieces,
    Growth.PLACES: _places,
    Growth.INDEX: _indexed,
    Growth.REPEAT: _repeated,
    Growth.CLASSES: _one_hot,
    Growth.NORM: _vectors,
}
