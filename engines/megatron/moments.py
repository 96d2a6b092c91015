"""The optimizer's moments, divided among the ranks that hold the same factors.

Copies of the model (data and context ranks) and of experts have the same values and the same sums of gradients. Each
keeps the moments of a part of them, steps that part, and tells the others the outcome: moments take as much less memory
as there are copies. Every value is stepped once, from the same numbers as on a rank alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engines.megatron.sharding import Sharding
from engines.operations import LoraSpec
from engines.ranks.collectives import gather
from engines.tuning.lora import Adapter, Gradient

ALIGNED = 64
"""Parts begin at multiples of it. The CPU's kernel rounds otherwise what is left over at the end of a vector."""


def share_of(length: int, copies: int) -> int:
    """Values that the first of `copies` ranks steps of `length` values that they all have; the others no more."""
    if copies == 1:
        return length
    each = -(-length // (copies * ALIGNED)) * ALIGNED
    return min(each, length)


class Group(NamedTuple):
    """The ranks that have the same values, None for a rank alone; the values as pieces of a vector, and this rank's."""

    ranks: dist.ProcessGroup | None
    pieces: list[slice]

    @property
    def copies(self) -> int:
        return 1 if self.ranks is None else self.ranks.size()

    def own(self) -> Iterator[slice]:
        """What this rank steps of each piece; nothing of short ones."""
        number = 0 if self.ranks is None else self.ranks.rank()
        for piece in self.pieces:
            each = share_of(piece.stop - piece.start, self.copies)
            start = min(piece.start + number * each, piece.stop)
            yield slice(start, min(start + each, piece.stop))

    def complete(self, vector: Tensor) -> None:
        """Have the vector hold what each rank has of its own part. Every rank must call it."""
        if self.ranks is None or not self.pieces:
            return
        widths = [share_of(piece.stop - piece.start, self.copies) for piece in self.pieces]
        mine = vector.new_zeros(sum(widths))
        for place, own in zip(mine.split(widths), self.own(), strict=True):
            place[: own.stop - own.start] = vector[own]
        told = gather(mine, self.ranks).view(self.copies, -1).split(widths, dim=1)
        for piece, parts in zip(self.pieces, told, strict=True):
            vector[piece] = parts.reshape(-1)[: piece.stop - piece.start]


class Ownership:
    """Which of a run's values this rank steps."""

    def __init__(self, dense: Group, experts: Group) -> None:
        self.groups = (dense, experts)
        self.alone = dense.ranks is None and experts.ranks is None
        self.own = [own for group in self.groups for own in group.own()]

    @property
    def count(self) -> int:
        """Values that it steps."""
        return sum(own.stop - own.start for own in self.own)

    def take(self, vector: Tensor) -> Tensor:
        """This rank's part, in memory of the vector's own where it is one piece."""
        if self.alone:
            return vector
        parts = [vector[own] for own in self.own]
        if not parts:  # an adapter of the last layer alone has nothing on the stages before
            return vector[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, own: Tensor, vector: Tensor) -> None:
        """Have the vector of all values hold `own` and the other ranks' parts. Every rank must call it."""
        if self.alone:
            if own is not vector:
                vector.copy_(own)
            return
        for place, part in zip(self.own, own.split([one.stop - one.start for one in self.own]), strict=True):
            vector[place] = part
        for group in self.groups:
            group.complete(vector)

    def whole(self, own: Tensor, count: int) -> Tensor:
        """A vector of all `count` values from the ranks' parts. Every rank must call it."""
        if self.alone:
            return own
        vector = own.new_zeros(count)
        self.put(own, vector)
        return vector


def ownership(
    sharding: Sharding,
    factors: Adapter | Gradient,
    copies: dist.ProcessGroup | None,
    expert_copies: dist.ProcessGroup | None,
) -> Ownership:
    """Of a run on this rank; `copies` have the same factors, `expert_copies` those of the same experts."""
    dense, experts = sharding.pieces(factors)
    return Ownership(Group(copies, dense), Group(expert_copies, experts))


def owned(sharding: Sharding, spec: LoraSpec) -> int:
    """Values whose moments lie on the first of the ranks with the same factors, which has as many as any."""
    layout = sharding.place.layout
    dense, experts = sharding.pieces_of(spec)
    copies = layout.data * layout.context
    of_dense = sum(share_of(piece.stop - piece.start, copies) for piece in dense)
    expert_copies = layout.stage_ranks // layout.expert
    return of_dense + sum(share_of(piece.stop - piece.start, expert_copies) for piece in experts)
