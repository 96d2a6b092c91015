"""AdamW on flat vectors, many of them in one call: `torch.optim.adamw` (Loshchilov & Hutter, arXiv:1711.05101)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engines.interface import UserError
from engines.losses import overflow_of_gradient
from engines.operations import OptimStep


@dataclass
class AdamW:
    """First and second moments (float32, of the vector's shape) and the number of steps taken.

    The moments are made by the first step, so that a run that never trains holds none.
    """

    steps: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both, of the vector's shape."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
        return self.exp_avg, self.exp_avg_sq


class Step(NamedTuple):
    """One step to take: `values` are moved in place, `gradient` is overwritten; all on one device."""

    optimizer: AdamW
    values: Tensor
    gradient: Tensor
    settings: OptimStep


@torch.no_grad()
def take(steps: Sequence[Step], norms: Sequence[float] | None = None) -> list[float | UserError]:
    """Take steps of different runs, in one call for all that have the same settings; a run's numbers are, to the last
    bit, those of its step alone. Gives each gradient's norm before clipping.

    Decay is decoupled: `values *= 1 - lr * weight_decay` before the step. Clipping is that of
    `torch.nn.utils.clip_grad_norm_`: multiply by min(1, max_norm / (norm + 1e-6)). Waits for the device once, for the
    norms. Where one is not finite nothing changes, and there is a UserError in its place. `norms` are given where the
    vectors are parts of larger ones, by whose norms they are clipped.
    """
    if not steps:
        return []
    told = _norms(steps) if norms is None else norms
    alike: dict[tuple[float, ...], list[Step]] = defaultdict(list)
    for step, norm in zip(steps, told, strict=True):
        limit = step.settings.grad_clip_norm
        if not math.isfinite(norm):
            continue
        if limit > 0:
            step.gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        wanted = step.settings
        key = (wanted.learning_rate, wanted.beta1, wanted.beta2, wanted.eps, wanted.weight_decay)
        alike[key].append(step)
    for some in alike.values():
        _take_alike(some)
    return [norm if math.isfinite(norm) else UserError(overflow_of_gradient(norm)) for norm in told]


def _norms(steps: Sequence[Step]) -> list[float]:
    norms = torch.stack([torch.linalg.vector_norm(step.gradient, dtype=torch.float64) for step in steps])
    told: list[float] = norms.tolist()
    return told


def _take_alike(steps: Sequence[Step]) -> None:
    wanted = steps[0].settings
    moments = [step.optimizer.moments(step.values) for step in steps]
    device = steps[0].values.device
    counts = torch.tensor([step.optimizer.steps for step in steps], dtype=torch.float32, device=device)
    adamw(
        [step.values for step in steps],
        [step.gradient for step in steps],
        [first for first, _ in moments],
        [second for _, second in moments],
        [],
        list(counts.unbind()),
        fused=True,
        amsgrad=False,
        beta1=wanted.beta1,
        beta2=wanted.beta2,
        lr=wanted.learning_rate,
        weight_decay=wanted.weight_decay,
        eps=wanted.eps,
        maximize=False,
    )
    for step in steps:
        step.optimizer.steps += 1
