"""Losses traced as the official SDK traces them, in the neutral form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss

from engines.graphs import CustomLoss, GraphInput, GraphNode

Function = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def traced(function: Function, **ranks: int) -> LossHandle:
    """What the SDK makes of a Python function."""
    return trace_loss(function, ranks, "session")  # type: ignore[arg-type]


def neutral(handle: LossHandle) -> CustomLoss:
    """The same as the gateway stores it."""
    nodes = tuple(
        GraphNode(node.op, node.name, node.target, node.args, node.kwargs)
        for node in encode_graph(handle).nodes
    )
    return CustomLoss(
        handle.name, tuple(GraphInput(entry.name, entry.rank) for entry in handle.inputs), nodes
    )


def placeholder(name: str) -> GraphNode:
    return GraphNode("placeholder", name, name)


def call(name: str, target: str, *args: Any, **kwargs: Any) -> GraphNode:
    """A function's call; a text among the arguments names a node."""
    encoded = [{"ref": arg} if isinstance(arg, str) else arg for arg in args]
    return GraphNode("call_function", name, target, encoded, kwargs)


def method(name: str, target: str, *args: Any, **kwargs: Any) -> GraphNode:
    encoded = [{"ref": arg} if isinstance(arg, str) else arg for arg in args]
    return GraphNode("call_method", name, target, encoded, kwargs)


def returning(loss: str, **metrics: str) -> GraphNode:
    named = {f"custom/{name}:sum": {"ref": node} for name, node in metrics.items()}
    return GraphNode("output", "output", "output", [{"tuple": [{"ref": loss}, {"dict": named}]}])


def graph(*nodes: GraphNode, rank: int = 1) -> CustomLoss:
    """A loss of the log-probs alone whose last node is what it returns, reduced to a sum."""
    ending = (method("total", "sum", nodes[-1].name if nodes else "logprobs"), returning("total"))
    return CustomLoss("made", (GraphInput("logprobs", rank),), (placeholder("logprobs"), *nodes, *ending))
