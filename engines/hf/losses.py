"""From the log-probs of a pass to the loss, and to its slope: the derivative by each log-prob."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engines.losses import LOSSES
from engines.losses.formulas import FORMULAS
from engines.operations import LossConfig


class Judged(NamedTuple):
    """The summed loss, float64 []; `slope` float32 of the shape of the log-probs, None where only the loss was
    wanted."""

    loss: Tensor
    slope: Tensor | None


def judge(
    loss: str,
    config: LossConfig,
    logprobs: Tensor,
    inputs: dict[str, Tensor],
    rows: list[slice],
    *,
    with_slope: bool,
) -> Judged:
    """The loss of `logprobs` [T, K] with `inputs` of the same shape; `rows` are those of each datum."""
    spec = LOSSES[loss]
    formula, settings = FORMULAS[loss], spec.with_defaults(config)

    def total(leaf: Tensor) -> Tensor:
        if not spec.per_sequence:
            return formula(leaf, inputs, settings).sum(dtype=torch.float64)
        parts = [
            formula(leaf[own], {name: values[own] for name, values in inputs.items()}, settings)
            for own in rows
        ]
        return torch.cat(parts).sum(dtype=torch.float64)

    return _evaluated(total, logprobs, with_slope=with_slope)


def _evaluated(total: Callable[[Tensor], Tensor], logprobs: Tensor, *, with_slope: bool) -> Judged:
    if not with_slope:
        with torch.no_grad():
            return Judged(total(logprobs), None)
    leaf = logprobs.detach().requires_grad_()
    value = total(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return Judged(value.detach(), slope)
