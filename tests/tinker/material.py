"""Captured bodies, the SDK's own encoder, and tensors to compare with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types
from tinker.proto import tinker_public_pb2 as sdk_wire
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest

from engines.operations import Datum
from engines.tensors import Tensor
from gateway.tinker.requests import Pass, parse_forward_backward, pass_of

CAPTURED = Path(__file__).parent / "captured"


class CapturedRequest(NamedTuple):
    """A JSON body as an SDK version sent it to a route."""

    route: str
    version: str
    body: dict[str, Any]


def captured_requests() -> list[CapturedRequest]:
    """One of each form."""
    lines = (CAPTURED / "requests.jsonl").read_text().splitlines()
    return [CapturedRequest(**json.loads(line)) for line in lines]


def captured(name: str) -> bytes:
    """A recorded body."""
    return (CAPTURED / f"{name}.bin").read_bytes()


def sdk_body(
    data: list[tinker.Datum],
    *,
    loss: str = "cross_entropy",
    config: Mapping[str, float | str] | None = None,
    forward_only: bool = False,
) -> bytes:
    """The bytes that the official SDK sends for these data."""
    given = types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config)  # type: ignore[arg-type]
    request = ForwardBackwardRequest(forward_backward_input=given, model_id="s:train:0", seq_id=7)
    message: sdk_wire.ForwardBackwardRequest = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return message.SerializeToString()


def parsed(body: bytes) -> Pass:
    """What this project makes of such bytes."""
    return pass_of(parse_forward_backward(body))


def array(tensor: Tensor) -> NDArray[Any]:
    """Its numbers, read without the code under test."""
    little = {"int32": "<i4", "int64": "<i8", "float32": "<f4"}[tensor.dtype]
    return np.ndarray(tensor.shape, little, tensor.data)


def inputs(datum: Datum) -> dict[str, list[Any]]:
    """The loss inputs as lists."""
    return {name: array(tensor).tolist() for name, tensor in datum.loss_inputs.items()}


def expand(values: list[Any], crow: list[int], col: list[int], columns: int) -> list[list[Any]]:
    """A sparse matrix written out, one item after the other."""
    rows = []
    for start, end in itertools.pairwise(crow):
        row = [0] * columns
        for place in range(start, end):
            row[col[place]] = values[place]
        rows.append(row)
    return rows
