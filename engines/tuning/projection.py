"""Float32 logits from hidden states of fewer bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.tuning.products import product

WIDENED = 2**24
"""Items of a bfloat16 weight that are held in float32 at once: 64 MiB."""


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Float32 logits [T, V]; those of bfloat16 factors are accumulated in float32 and not rounded in between.

    CUDA has such a product. Elsewhere the factors are widened first, the weight a part at a time. They are written to
    `out`, if given: fresh memory has to be cleared by the system first, which takes as long as a pass over the logits.
    """
    if hidden.dtype == torch.float32:
        return product(hidden, weight, bias) if out is None else _into(out, hidden, weight, bias)
    if out is None:
        out = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    if hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        _widened_product(hidden.float(), weight, out)
    return out if bias is None else out.add_(bias.float())


def _into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _widened_product(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Float32 `logits` [T, V] of float32 `hidden` [T, H] and a narrower `weight` [V, H]."""
    step = max(1, WIDENED // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        logits[:, start : start + step] = F.linear(hidden, weight[start : start + step].float())
