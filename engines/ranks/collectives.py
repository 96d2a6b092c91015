"""Collectives on one tensor, by the names that the installed torch has for them: 2.13 has renamed them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def combine(
    tensor: Tensor, group: dist.ProcessGroup, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> None:
    """The ranks' tensors to their sum, or what else `how` says, in place. A rank alone has it already."""
    if group.size() > 1:
        dist.all_reduce(tensor, how, group=group)


def gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's [n, ...], one below the other [ranks * n, ...], on all of them."""
    gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    _gather(gathered, own.contiguous(), group=group)
    return gathered


def scatter_sum(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of the ranks' [ranks * n, ...] the sum, of which each gets its own [n, ...]."""
    own = parts.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    _scatter_sum(own, parts.contiguous(), group=group)
    return own
