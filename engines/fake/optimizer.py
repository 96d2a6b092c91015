"""AdamW in numpy, step for step what `torch.optim.AdamW` computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.interface import UserError
from engines.losses import overflow_of_gradient
from engines.operations import OptimStep

Array = NDArray[Any]


@dataclass
class AdamW:
    """The state of one run: steps taken, and both moments, laid out like the values (None before the first step)."""

    steps: int = 0
    exp_avg: Array | None = None
    exp_avg_sq: Array | None = None

    def step(self, values: Array, gradient: Array, settings: OptimStep) -> float:
        """Move `values` in place; gives the gradient's norm before clipping.

        Loshchilov & Hutter, arXiv:1711.05101: the decay is decoupled, both moments are corrected for their start at
        zero. Clipping multiplies by min(1, limit / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.
        Raises UserError, with nothing changed, when the norm is not finite.
        """
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
        if not math.isfinite(norm):
            raise UserError(overflow_of_gradient(norm))
        if settings.grad_clip_norm > 0:
            gradient = gradient * min(1.0, settings.grad_clip_norm / (norm + 1e-6))
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = np.zeros_like(values), np.zeros_like(values)
        self.steps += 1
        self.exp_avg += (gradient - self.exp_avg) * (1 - settings.beta1)
        self.exp_avg_sq *= settings.beta2
        self.exp_avg_sq += gradient * gradient * (1 - settings.beta2)
        correction1 = 1 - settings.beta1**self.steps
        correction2 = 1 - settings.beta2**self.steps
        denominator = np.sqrt(self.exp_avg_sq) / math.sqrt(correction2) + settings.eps
        values *= 1 - settings.learning_rate * settings.weight_decay
        values -= settings.learning_rate / correction1 * (self.exp_avg / denominator)
        return norm
