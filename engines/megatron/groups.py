"""The groups of ranks that megatron-core is not asked for: those that share a sequence, or the experts of a layer.

To megatron-core context parallel ranks are data parallel ones: what they add to a gradient is summed alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from engines.megatron.constraints import Layout


class Groups(NamedTuple):
    """Of one rank; None where it would be alone."""

    context: dist.ProcessGroup | None
    """Ranks that hold parts of the same sequences."""
    expert: dist.ProcessGroup | None
    """Ranks that hold different experts of the same layers."""
    expert_copies: dist.ProcessGroup | None
    """Ranks that hold the same experts."""


def make_groups(layout: Layout, rank: int, patience_s: float) -> Groups:
    """A rank's groups; every rank must call it, for every rank takes part in making each. `patience_s` bounds how long
    a rank waits for another in one of them."""
    patience = timedelta(seconds=patience_s)
    return Groups(
        _make(context_ranks(layout), rank, patience),
        _make(expert_ranks(layout), rank, patience),
        _make(expert_copies(layout), rank, patience),
    )


def context_ranks(layout: Layout) -> Iterator[list[int]]:
    """Context ranks follow tensor ranks: they are `tensor` apart."""
    for first in range(0, layout.ranks, layout.tensor * layout.context):
        for tensor in range(layout.tensor):
            yield [first + tensor + layout.tensor * number for number in range(layout.context)]


def expert_ranks(layout: Layout) -> Iterator[list[int]]:
    """Neighbours within a stage."""
    for first in range(0, layout.ranks, layout.expert):
        yield list(range(first, first + layout.expert))


def expert_copies(layout: Layout) -> Iterator[list[int]]:
    """Those of a stage that are `expert` apart."""
    for first in range(0, layout.ranks, layout.stage_ranks):
        for number in range(layout.expert):
            yield list(range(first + number, first + layout.stage_ranks, layout.expert))


def _make(families: Iterator[list[int]], rank: int, patience: timedelta) -> dist.ProcessGroup | None:
    found = None
    for ranks in families:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=patience)
            if rank in ranks:
                found = group
    return found
