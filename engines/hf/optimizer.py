"""AdamW on one flat vector, with the arithmetic of torch.optim.AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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

    @torch.no_grad()
    def step(self, values: Tensor, gradient: Tensor, settings: OptimStep) -> float:
        """Move `values` in place; `gradient` is overwritten. Returns the gradient's norm before clipping.

        Decay is decoupled: `values *= 1 - lr * weight_decay` before the step. Clipping is that of
        `torch.nn.utils.clip_grad_norm_`: multiply by min(1, max_norm / (norm + 1e-6)). Waits for the device once, for
        the norm. Raises UserError, with nothing changed, when that is not finite.
        """
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        told = float(norm)
        if not math.isfinite(told):
            raise UserError(overflow_of_gradient(told))
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
        if settings.grad_clip_norm > 0:
            gradient.mul_((settings.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        self.exp_avg.lerp_(gradient, 1 - settings.beta1)
        self.exp_avg_sq.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        correction1 = 1 - settings.beta1**self.steps
        correction2 = 1 - settings.beta2**self.steps
        denominator = (
            torch.sqrt(self.exp_avg_sq, out=gradient).div_(math.sqrt(correction2)).add_(settings.eps)
        )
        values.mul_(1 - settings.learning_rate * settings.weight_decay)
        values.addcdiv_(self.exp_avg, denominator, value=-settings.learning_rate / correction1)
        return told
