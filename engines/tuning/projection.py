"""Float32 logits from hidden states of fewer bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED = 2**24
"""Items of a bfloat16 weight that are held in float32 at once: 64 MiB."""


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits; those of bfloat16 factors are accumulated in float32 and not rounded in between.

    CUDA has such a product. Elsewhere the factors are widened first, the weight a part at a time.
    """
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    if hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = _widened_product(hidden.float(), weight)
    return logits if bias is None else logits.add_(bias.float())


def _widened_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float32 [T, V] of float32 `hidden` [T, H] and a narrower `weight` [V, H]."""
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    step = max(1, WIDENED // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        logits[:, start : start + step] = F.linear(hidden, weight[start : start + step].float())
    return logits
