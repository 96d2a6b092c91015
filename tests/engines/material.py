"""Operations and requests for the fake engine, small and always the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.operations import (
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    SampleRequest,
)
from engines.tensors import Tensor

CREATE = CreateRun(LoraSpec(rank=4, seed=7))
STEP = OptimStep(learning_rate=1e-2)


def datum(text: str = "hello, world") -> Datum:
    """A text to learn: every byte predicts the next one."""
    tokens = np.frombuffer(text.encode(), dtype=np.uint8)
    weights = np.ones(len(tokens) - 1, dtype=np.float32)
    inputs = {"target_tokens": Tensor.of(tokens[1:].astype(np.int64)), "weights": Tensor.of(weights)}
    return Datum(Tensor.of(tokens[:-1].astype(np.int32)), inputs)


def learn(*texts: str) -> ForwardBackward:
    return ForwardBackward([datum(text) for text in texts or ("hello, world",)], "cross_entropy")


def look(*texts: str) -> Forward:
    return Forward([datum(text) for text in texts or ("hello, world",)], "cross_entropy")


def sample(text: str = "hello", **settings: Any) -> SampleRequest:
    """Eight tokens that nothing stops, unless settings say otherwise."""
    defaults: dict[str, Any] = {"num_samples": 1, "seed": 3, "max_tokens": 8, "stop_at_eos": False}
    prompt = Tensor.of(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32))
    return SampleRequest(prompt=prompt, **{**defaults, **settings})
