"""The losses with their derivatives: what autograd does elsewhere, written out.

p = `logprobs`, the current policy's log-prob of the target; q = `inputs["logprobs"]`, the sampler's; A = advantages;
r = exp(p - q), so dr/dp = r. Arrays share one shape ([T] or [T, K]); `config` holds every key of the loss. Each
formula gives the loss and its derivative by p for every token of one datum. `inputs` may have keys of `config` too, one
number a token. Definitions and sources: `engines.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.losses import HIGH, LOW

Array = NDArray[Any]
Formula = Callable[[Array, Mapping[str, Array], Mapping[str, float]], tuple[Array, Array]]


def cross_entropy(p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    """-p w."""
    weights = inputs["weights"]
    return -p * weights, -weights


def importance_sampling(
    p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]
) -> tuple[Array, Array]:
    """-r A."""
    loss = -np.exp(p - inputs["logprobs"]) * inputs["advantages"]
    return loss, loss


def ppo(p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    """-min(r A, clamp(r) A); no derivative where the clamped branch is the smaller one."""
    return _clipped(np.exp(p - inputs["logprobs"]), inputs, config)


def cispo(p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    """-c p A, where c = clamp(r) counts as a constant."""
    slope = -_clamp(np.exp(p - inputs["logprobs"]), inputs, config) * inputs["advantages"]
    return slope * p, slope


def dro(p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    """-(p A - beta / 2 (p - q)^2)."""
    distance, beta = p - inputs["logprobs"], config["beta"]
    return 0.5 * beta * distance * distance - p * inputs["advantages"], beta * distance - inputs["advantages"]


def gspo(p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    """As ppo, with the ratio of the whole datum, whose derivative by each token's p is that ratio."""
    marked = inputs["sequence_ratio_mask"] != 0
    mean = (p - inputs["logprobs"])[marked].mean(dtype=p.dtype)
    return _clipped(np.full_like(p, np.exp(mean)), inputs, config)


def _clipped(ratio: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> tuple[Array, Array]:
    free = ratio * inputs["advantages"]
    bound = _clamp(ratio, inputs, config) * inputs["advantages"]
    return -np.minimum(free, bound), np.where(free <= bound, -free, np.zeros_like(free))


def _clamp(ratio: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> Array:
    """Within the bounds of each token, or of all."""
    low, high = (inputs[name] if name in inputs else config[name] for name in (LOW, HIGH))
    return np.clip(ratio, low, high)


FORMULAS: dict[str, Formula] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
