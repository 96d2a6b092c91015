"""The built-in losses in torch: each turns log-probs into a loss per token; a loss is the sum over all tokens.

p = `logprobs`, the current policy's log-prob of the target; q = `inputs["logprobs"]`, the sampler's; A = advantages;
r = exp(p - q). Tensors are float32 of one shape ([T] or [T, K]); `config` holds every key of the loss, defaults
filled in, but for those that `inputs` has as tensors. For a loss that is `per_sequence` they are of one datum. Names,
inputs and defaults are declared in `engines.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.losses import HIGH, LOW

Formula = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]


def cross_entropy(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-p * w; weights of any sign."""
    return -logprobs * inputs["weights"]


def importance_sampling(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """-r * A."""
    return -torch.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]


def ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-min(r * A, clamp(r, low, high) * A); Schulman et al., arXiv:1707.06347, with absolute bounds of the ratio."""
    return _clipped_objective(torch.exp(logprobs - inputs["logprobs"]), inputs, config)


def cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-stopgrad(clamp(r, low, high)) * p * A; MiniMax-M1, arXiv:2506.13585."""
    clipped = _clamp(torch.exp(logprobs.detach() - inputs["logprobs"]), inputs, config)
    return -clipped * logprobs * inputs["advantages"]


def dro(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-(p * A - beta / 2 * (p - q)^2); Richemond et al., arXiv:2405.19107."""
    distance = logprobs - inputs["logprobs"]
    return 0.5 * config["beta"] * distance * distance - logprobs * inputs["advantages"]


def gspo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Clipping as ppo does, with the ratio of the whole datum in the place of r; Zheng et al., arXiv:2507.18071.

    Each token has the value of the sequence's ratio and the gradient of its own log-prob.
    """
    fixed = logprobs.detach()
    marked = inputs["sequence_ratio_mask"] != 0
    mean = torch.where(marked, fixed - inputs["logprobs"], 0.0).sum() / marked.sum()
    return _clipped_objective(torch.exp(mean + logprobs - fixed), inputs, config)


def _clipped_objective(ratio: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(ratio, inputs, config) * advantages)


def _clamp(ratio: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Within the bounds of each token, or of all."""
    if LOW in inputs or HIGH in inputs:
        low, high = (
            inputs[name] if name in inputs else ratio.new_tensor(config[name]) for name in (LOW, HIGH)
        )
        return ratio.clamp(low, high)
    return ratio.clamp(config[LOW], config[HIGH])


FORMULAS: dict[str, Formula] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
