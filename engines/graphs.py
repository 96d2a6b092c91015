"""A loss that a client has traced, as plain data: part of the operations that use it, so that a replay has it too."""

from __future__ import annotations

from typing import Any

import msgspec


class GraphNode(msgspec.Struct, frozen=True, array_like=True):
    """One node of a traced function, as torch.fx records it.

    `op` is placeholder, call_function, call_method or output; `target` the parameter, the function's qualified name or
    the method; `args` and `kwargs` are JSON values, in which an object of one key stands for what JSON has not:
    `{"ref": name}` an earlier node, and `tuple`, `dict`, `slice`, `ellipsis`, `float`, `dtype`, `device`, `layout`,
    `memory_format`.
    """

    op: str
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class GraphInput(msgspec.Struct, frozen=True, array_like=True):
    """A parameter of a traced loss: `logprobs`, or a loss input of that name with so many dimensions, 0 to 2."""

    name: str
    rank: int


class CustomLoss(msgspec.Struct, frozen=True):
    """A loss of one datum: from its log-probs and loss inputs to a number and metrics; summed over the data.

    The first input is `logprobs`, of the shape of the datum's `target_tokens`. `engines.losses.graph` says what is
    allowed in the nodes.
    """

    name: str
    inputs: tuple[GraphInput, ...]
    nodes: tuple[GraphNode, ...]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[CustomLoss] = msgspec.msgpack.Decoder(CustomLoss)


def encode_loss(loss: CustomLoss) -> bytes:
    """The bytes that are stored."""
    return _ENCODER.encode(loss)


def decode_loss(body: bytes) -> CustomLoss:
    """Raises msgspec.DecodeError or msgspec.ValidationError when the bytes are not a traced loss."""
    return _DECODER.decode(body)
