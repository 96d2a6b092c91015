"""The built-in losses in torch: each turns log-probs into a loss per token; a loss is the sum over all tokens.

p = `logprobs`, the current policy's log-prob of the target; q = `inputs["logprobs"]`, the sampler's; A = advantages;
r = exp(p - q). Tensors are float32 of one shape ([T] or [T, K]); `config` holds every key of the loss, defaults
filled in. Names, inputs and defaults are declared in `engines.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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
    ratio = torch.exp(logprobs - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped * advantages)


def cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-stopgrad(clamp(r, low, high)) * p * A; MiniMax-M1, arXiv:2506.13585."""
    ratio = torch.exp(logprobs.detach() - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -clipped * logprobs * inputs["advantages"]


def dro(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-(p * A - beta / 2 * (p - q)^2); Richemond et al., arXiv:2405.19107."""
    distance = logprobs - inputs["logprobs"]
    return 0.5 * config["beta"] * distance * distance - logprobs * inputs["advantages"]


FORMULAS: dict[str, Formula] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}
