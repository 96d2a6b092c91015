"""A traced loss as something that torch can run: rebuilt from the allowed operations, never evaluated as code.

Computed on the CPU, where the official SDK computes such a loss too, with the same calls in the same order: its numbers
are the same to the last bit. A graph that `engines.losses.graph.check_graph` has not accepted must not come here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.graphs import CustomLoss, GraphNode
from engines.interface import UserError
from engines.losses.allowed import DTYPES, FUNCTIONS, MEMORY_FORMATS, METHODS, Growth, canonical
from engines.losses.growth import Allowance, charge

Function = Callable[..., Any]

_MAX_NUMBER = 2**63
_MAX_EXPONENT = 64
_MAX_ENTRIES = 1000
"""Of tuples of sizes that are added up."""

_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "operator": operator,
    "math": math,
}


def _found(name: str) -> Function:
    """The function behind a name of our own list."""
    space, _, last = name.rpartition(".")
    function: Function = getattr(_NAMESPACES[space], last)
    return function


# Looked up once, for the names of our list; a client's name is only ever a key of these tables.
_FUNCTIONS: dict[str, Function] = {name: _found(name) for name in FUNCTIONS}
_METHODS: dict[str, Function] = {name: getattr(Tensor, name) for name in METHODS}
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_FORMATS: dict[str, torch.memory_format] = {name: getattr(torch, name) for name in MEMORY_FORMATS}
_OF_TENSORS: dict[str, Function] = {
    "H": lambda tensor: tensor.H,
    "T": lambda tensor: tensor.T,
    "device": lambda tensor: tensor.device,
    "dtype": lambda tensor: tensor.dtype,
    "is_cuda": lambda tensor: tensor.is_cuda,
    "layout": lambda tensor: tensor.layout,
    "mH": lambda tensor: tensor.mH,
    "mT": lambda tensor: tensor.mT,
    "ndim": lambda tensor: tensor.ndim,
    "requires_grad": lambda tensor: tensor.requires_grad,
    "shape": lambda tensor: tensor.shape,
}
_OF_PAIRS: dict[str, Function] = {
    "values": lambda pair: pair.values,
    "indices": lambda pair: pair.indices,
}

_WHAT_TORCH_RAISES = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class _Ref(NamedTuple):
    """The value of an earlier node."""

    place: int


class _Step(NamedTuple):
    """One call: `args` and `kwargs` are decoded but for the references in them."""

    what: str
    growth: Growth
    function: Function
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class LossProgram:
    """A traced loss that can be run for one datum after the other."""

    def __init__(self, loss: CustomLoss) -> None:
        self.loss = loss
        places = {node.name: place for place, node in enumerate(loss.nodes)}
        self._steps = [
            _step(node, places) for node in loss.nodes if node.op in ("call_function", "call_method")
        ]
        self._returned = _decoded(loss.nodes[-1].args[0], places)

    def run(self, inputs: Sequence[Tensor], allowance: Allowance) -> tuple[Tensor, dict[str, float]]:
        """Loss, of shape [], and metrics of one datum. Raises UserError naming the call that failed."""
        allowance.begin_datum()
        values: list[Any] = list(inputs)
        for step in self._steps:
            values.append(_performed(step, values, allowance))
        total, metrics = _filled(self._returned, values)
        if not isinstance(total, Tensor) or total.ndim or total.is_complex():
            given = (
                f"{total.dtype} {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            )
            raise UserError(f"loss {self.loss.name!r} must return a scalar tensor as its loss, not {given}")
        return total, {name: _number(self.loss.name, name, value) for name, value in metrics.items()}


def slope_of(loss: Tensor, logprobs: Tensor) -> Tensor:
    """The derivative of a loss, of shape [], by each log-prob. Raises UserError when there is none."""
    if not loss.requires_grad or not loss.is_floating_point():
        raise UserError("the loss does not depend on logprobs, so there is nothing to train on")
    try:
        (slope,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
    except _WHAT_TORCH_RAISES as error:
        raise UserError(f"the loss has no gradient: {told(error)}") from error
    if slope is None:
        raise UserError("the loss does not depend on logprobs, so there is nothing to train on")
    return slope


def _number(loss: str, name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach().item())
    if isinstance(value, (int, float)):
        return float(value)
    raise UserError(f"loss {loss!r}: the metric {name!r} must be one number")


# ---------------------------------------------------------------------------- rebuilding


def _step(node: GraphNode, places: Mapping[str, int]) -> _Step:
    args = [_decoded(value, places) for value in node.args]
    kwargs = {name: _decoded(value, places) for name, value in node.kwargs.items()}
    if node.op == "call_method":
        what = f"{node.name}: the method {node.target}"
        return _Step(what, METHODS[node.target], _method(node.target), args, kwargs)
    target = canonical(node.target)
    what = f"{node.name}: {target}"
    if target == "getattr":
        return _Step(what, Growth.VIEW, _reading(node.args[1]), args[:1], kwargs)
    return _Step(what, FUNCTIONS[target], _guarded(target, _FUNCTIONS[target]), args, kwargs)


def _reading(name: str) -> Function:
    def read(value: Any) -> Any:
        if isinstance(value, Tensor) and name in _OF_TENSORS:
            return _OF_TENSORS[name](value)
        if isinstance(value, tuple) and name in _OF_PAIRS:
            return _OF_PAIRS[name](value)
        raise UserError(f"{name} cannot be read from a {type(value).__name__}")

    return read


def _method(name: str) -> Function:
    function = _METHODS[name]

    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(owner, torch.Size) and name == "numel":
            return owner.numel()
        if not isinstance(owner, Tensor):
            raise UserError(f"it was called on a {type(owner).__name__}, not on a tensor")
        return function(owner, *args, **kwargs)

    return call


def _guarded(target: str, function: Function) -> Function:
    """Python's own arithmetic is not bounded by itself: numbers and tuples can grow without a tensor."""
    if not target.startswith("operator."):
        return function
    name = target.removeprefix("operator.")

    def call(*args: Any) -> Any:
        if not any(isinstance(arg, Tensor) for arg in args):
            _check_plain(name, args)
        return function(*args)

    return call


def _check_plain(name: str, args: Sequence[Any]) -> None:
    numbers = all(isinstance(arg, (int, float)) for arg in args)
    whole = all(isinstance(arg, int) for arg in args)
    if whole and name in ("pow", "ipow", "lshift", "ilshift") and abs(args[-1]) > _MAX_EXPONENT:
        raise UserError(f"{args[0]} to the {args[-1]}th place or power is too large a number")
    if numbers or name in ("eq", "ne", "getitem"):
        return
    sizes = [len(arg) for arg in args if isinstance(arg, (tuple, list))]
    if name in ("add", "iadd") and len(sizes) == len(args) and sum(sizes) <= _MAX_ENTRIES:
        return
    raise UserError(f"it was given {', '.join(type(arg).__name__ for arg in args)}")


def _decoded(value: Any, places: Mapping[str, int]) -> Any:
    """An encoded argument with its references still open."""
    if isinstance(value, list):
        return [_decoded(inner, places) for inner in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "ref":
        return _Ref(places[inner])
    if tag == "dict":
        return {name: _decoded(part, places) for name, part in inner.items()}
    if tag in ("tuple", "slice"):
        parts = [_decoded(part, places) for part in inner]
        return tuple(parts) if tag == "tuple" else slice(*parts)
    return _CONSTANTS[tag](inner)


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "ellipsis": lambda _: Ellipsis,
    "float": float,
    "dtype": lambda name: _DTYPES[name],
    "device": torch.device,
    "layout": lambda _: torch.strided,
    "memory_format": lambda name: _FORMATS[name],
}


# ---------------------------------------------------------------------------- running


def _performed(step: _Step, values: Sequence[Any], allowance: Allowance) -> Any:
    """The value of a node. What torch cannot do is the loss's fault, and told with torch's words."""
    try:
        args = _filled(step.args, values)
        kwargs = _filled(step.kwargs, values)
        charge(allowance, step.growth, step.function, args, kwargs)
        result = step.function(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{step.what}: {error}") from error
    except _WHAT_TORCH_RAISES as error:
        raise UserError(f"{step.what}: {told(error)}") from error
    if isinstance(result, int) and abs(result) >= _MAX_NUMBER:
        raise UserError(f"{step.what}: {len(str(result))} digits are too large a number")
    return result


def told(error: Exception) -> str:
    """The first line of what torch says, and not more of it than can be read."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]


def _filled(value: Any, values: Sequence[Any]) -> Any:
    """The argument with the values of the nodes that it refers to."""
    if isinstance(value, _Ref):
        return values[value.place]
    if isinstance(value, list):
        return [_filled(inner, values) for inner in value]
    if isinstance(value, tuple):
        return tuple(_filled(inner, values) for inner in value)
    if isinstance(value, dict):
        return {name: _filled(inner, values) for name, inner in value.items()}
    if isinstance(value, slice):
        return slice(*(_filled(part, values) for part in (value.start, value.stop, value.step)))
    return value
