"""Whether a traced loss is one: decided from its nodes alone, in milliseconds, without torch and without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engines.graphs import CustomLoss, GraphInput, GraphNode
from engines.interface import UserError
from engines.losses.allowed import (
    ATTRIBUTES,
    DTYPES,
    FORBIDDEN_KEYWORDS,
    FUNCTIONS,
    MEMORY_FORMATS,
    METHODS,
    canonical,
)

MAX_NODES = 2000
MAX_VALUES = 20_000
"""Arguments of all nodes together, with what they contain."""
MAX_TEXT = 200
"""Longest name or text."""
MAX_INTEGER = 2**53
MAX_DEPTH = 12
"""How deep arguments may be nested."""
MAX_INPUTS = 16

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_ECHO = 80
_FLOATS = frozenset({"inf", "-inf", "nan"})


def check_graph(loss: CustomLoss) -> None:
    """Raises UserError if the loss cannot be rebuilt from allowed operations."""
    if len(loss.nodes) > MAX_NODES:
        raise UserError(f"graph.nodes has {len(loss.nodes)} nodes; at most {MAX_NODES} are taken")
    _check_inputs(loss.inputs)
    _check_parameters(loss)
    checker = _Checker()
    for index, node in enumerate(loss.nodes):
        checker.check(f"graph.nodes[{index}]", node)
    if not loss.nodes or loss.nodes[-1].op != "output":
        raise UserError("graph.nodes does not end with its output node")


def metric_names(loss: CustomLoss) -> list[str]:
    """The metrics of a loss that `check_graph` has accepted, in its order."""
    _, metrics = _parts_of_output(loss.nodes[-1])
    return list(metrics)


def _parts_of_output(node: GraphNode) -> tuple[Any, Mapping[str, Any]]:
    """The encoded loss and metrics of a checked output node."""
    (returned,) = node.args
    loss, metrics = returned["tuple"] if isinstance(returned, dict) else returned
    return loss, metrics["dict"]


def _check_inputs(inputs: tuple[GraphInput, ...]) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise UserError(f"inputs has {len(inputs)} entries; a loss takes from 1 to {MAX_INPUTS}")
    for index, entry in enumerate(inputs):
        if not _INPUT.fullmatch(entry.name):
            raise UserError(
                f"inputs[{index}].name is {entry.name[:_ECHO]!r}; it must be a lowercase name of letters, digits and _"
            )
        if entry.rank not in (0, 1, 2):
            raise UserError(f"inputs[{index}].rank is {entry.rank}; it must be 0, 1 or 2")
    if inputs[0].name != "logprobs" or inputs[0].rank == 0:
        raise UserError(
            f"inputs[0] is {inputs[0].name[:_ECHO]!r} of rank {inputs[0].rank}; it must be logprobs, of rank 1 or 2"
        )
    if len({entry.name for entry in inputs}) < len(inputs):
        raise UserError("inputs names an input twice")


def _check_parameters(loss: CustomLoss) -> None:
    """The first nodes stand for the inputs, in order, and no others do."""
    placed = [node.target for node in loss.nodes if node.op == "placeholder"]
    leading = [node.target for node in loss.nodes[: len(loss.inputs)] if node.op == "placeholder"]
    names = [entry.name for entry in loss.inputs]
    if placed != names or leading != names:
        shown = ", ".join(placed)[:_ECHO]
        raise UserError(f"graph.nodes begins with the parameters {shown!r}; inputs has {', '.join(names)}")


class _Checker:
    """What has been seen of a graph so far: names of nodes, and how many values their arguments hold."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._values = 0
        self._ended = False

    def check(self, where: str, node: GraphNode) -> None:
        if self._ended:
            raise UserError(f"{where} comes after the output node")
        if not _NAME.fullmatch(node.name) or node.name in self._names:
            raise UserError(
                f"{where}.name is {node.name[:_ECHO]!r}; each node has a name of its own, of letters, digits and _"
            )
        for index, value in enumerate(node.args):
            self._check_value(f"{where}.args[{index}]", value, 0)
        for name, value in node.kwargs.items():
            if not _NAME.fullmatch(name) or name in FORBIDDEN_KEYWORDS:
                raise UserError(f"{where}.kwargs has {name[:_ECHO]!r}, which no loss may give")
            self._check_value(f"{where}.kwargs[{name!r}]", value, 0)
        self._check_node(where, node)
        self._names.add(node.name)

    def _check_node(self, where: str, node: GraphNode) -> None:
        match node.op:
            case "placeholder":
                if node.args or node.kwargs:
                    raise UserError(f"{where} is a parameter with a default; every input is required")
            case "call_function":
                _check_function(where, node)
            case "call_method":
                _check_method(where, node)
            case "output":
                _check_output(where, node)
                self._ended = True
            case _:
                raise UserError(
                    f"{where}.op is {node.op[:_ECHO]!r}; a loss consists of placeholder, call_function, call_method "
                    "and output: it holds no module and no tensor of its own"
                )

    def _check_value(self, where: str, value: Any, depth: int) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise UserError(
                f"{where}: the arguments hold more than {MAX_VALUES} values; a loss is no place for data"
            )
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested deeper than {MAX_DEPTH} levels")
        match value:
            case None | bool() | float():
                return
            case int():
                if abs(value) > MAX_INTEGER:
                    raise UserError(f"{where} is a number beyond ±2^53")
            case str():
                if len(value) > MAX_TEXT:
                    raise UserError(
                        f"{where} is a text of {len(value)} characters; at most {MAX_TEXT} are taken"
                    )
            case list():
                self._check_all(where, value, depth)
            case dict():
                self._check_tagged(where, value, depth)
            case _:
                raise UserError(f"{where} is a {type(value).__name__}, which no argument can be")

    def _check_all(self, where: str, values: Any, depth: int) -> None:
        for value in values:
            self._check_value(where, value, depth + 1)

    def _check_tagged(self, where: str, value: dict[str, Any], depth: int) -> None:
        """An object of one key, for what JSON has not."""
        if len(value) != 1:
            raise UserError(f"{where} is an object with {len(value)} keys; one key says what it stands for")
        ((tag, inner),) = value.items()
        match tag, inner:
            case "ref", str():
                if inner not in self._names:
                    raise UserError(f"{where} refers to {inner[:_ECHO]!r}, which is no earlier node")
            case "tuple", list():
                self._check_all(where, inner, depth)
            case "slice", [_, _, _]:
                self._check_all(where, inner, depth)
            case "dict", dict():
                for key in inner:
                    if len(key) > MAX_TEXT:
                        raise UserError(
                            f"{where} has a key of {len(key)} characters; at most {MAX_TEXT} are taken"
                        )
                self._check_all(where, inner.values(), depth)
            case _:
                _check_constant(where, tag, inner)


def _check_constant(where: str, tag: str, value: Any) -> None:
    allowed: dict[str, frozenset[Any]] = {
        "ellipsis": frozenset({True}),
        "float": _FLOATS,
        "dtype": DTYPES,
        "device": frozenset({"cpu"}),
        "layout": frozenset({"strided"}),
        "memory_format": MEMORY_FORMATS,
    }
    if tag not in allowed:
        kinds = ", ".join(("ref", "tuple", "dict", "slice", *allowed))
        raise UserError(f"{where} has the key {tag[:_ECHO]!r}; allowed are {kinds}")
    if not isinstance(value, (str, bool)) or value not in allowed[tag]:
        given = repr(value)[:_ECHO]
        raise UserError(
            f"{where} is the {tag} {given}; allowed are {', '.join(map(str, sorted(allowed[tag])))}"
        )


def _check_function(where: str, node: GraphNode) -> None:
    target = canonical(node.target)
    if target == "getattr":
        match node.args:
            case [{"ref": _}, str(name)] if name in ATTRIBUTES:
                return
            case _:
                raise UserError(
                    f"{where} reads {str(node.args[1:])[:_ECHO]}; a loss may read {', '.join(sorted(ATTRIBUTES))}"
                )
    if target not in FUNCTIONS:
        raise UserError(
            f"{where} calls {node.target[:_ECHO]!r}, which is not among the functions that a loss may call on the "
            "server"
        )
    _check_device(where, node)


def _check_method(where: str, node: GraphNode) -> None:
    if node.target not in METHODS:
        raise UserError(
            f"{where} calls the method {node.target[:_ECHO]!r}, which is not among those that a loss may call on the "
            "server"
        )
    match node.args:
        case [{"ref": _}, *_]:
            _check_device(where, node)
        case _:
            raise UserError(f"{where} calls the method {node.target!r} of a constant")


def _check_device(where: str, node: GraphNode) -> None:
    """A loss is computed where its log-probs are handed to it, and nowhere else."""
    texts = [value for value in node.args if isinstance(value, str)] if node.target in ("to", "type") else []
    texts += [value for name, value in node.kwargs.items() if name == "device" and isinstance(value, str)]
    if any(text != "cpu" for text in texts) or (node.target == "type" and texts):
        raise UserError(f"{where} asks for {texts[0][:_ECHO]!r}; a loss is computed on the device cpu")


def _check_output(where: str, node: GraphNode) -> None:
    match node.args:
        case [{"tuple": [{"ref": _}, {"dict": dict(metrics)}]}] | [[{"ref": _}, {"dict": dict(metrics)}]]:
            pass
        case _:
            raise UserError(f"{where} must return (loss, metrics): a tensor and a dict")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            raise UserError(
                f"{where}: the metric {name[:_ECHO]!r} must be named custom/<name>:sum or custom/<name>:mean"
            )
        if not (isinstance(value, dict) and "ref" in value):
            raise UserError(f"{where}: the metric {name!r} must be a value that the graph computes")
