"""What one rank computes of a pass: its tokens, padded to what the ranks can divide, and which run each belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engines.megatron.attention import Packing
from engines.megatron.constraints import Layout
from engines.megatron.context_parallel import ContextLayout, chunks_of, gather_rows, rows_of
from engines.megatron.places import Place
from engines.tuning.collating import Batch, Pack
from engines.tuning.lora import Segment
from engines.tuning.packed_attention import PackedLayout


class Portion(NamedTuple):
    """Int64 `tokens` and `positions` [1, t], `targets` [t, K] of the rank's tokens, and its `segments` among them.

    `total` are the pass's tokens without padding. `order` says where the tokens of all context ranks, one rank's after
    the other's, lie in the padded pass; `rows` where this rank's do.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    packing: Packing
    segments: list[Segment]
    total: int
    rows: Tensor | None
    order: Tensor | None
    group: dist.ProcessGroup | None

    def whole(self, logprobs: Tensor) -> Tensor:
        """The pass's log-probs [total, K] of the ranks' own [t, K]; every context rank must call it."""
        if self.group is not None and self.order is not None:
            logprobs = gather_rows(logprobs, self.order, self.group)
        return logprobs[: self.total]

    def own(self, slope: Tensor) -> Tensor:
        """What belongs to this rank's tokens of a slope [total, K]; zero where they are padding."""
        count = self.tokens.shape[1] * (1 if self.group is None else self.group.size())
        padded = F.pad(slope, (0, 0, 0, count - self.total))
        return padded if self.rows is None else padded[self.rows]


def padded(layout: Layout, tokens: int) -> int:
    """Tokens of a pass with so many as the ranks can divide; at least one for each."""
    multiple = layout.tensor if layout.sequence else 1
    if layout.context > 1:
        multiple = layout.context * math.lcm(multiple, 2)
    return max(multiple, tokens + -tokens % multiple)


def empty(device: torch.device) -> Batch:
    """What a rank has to do in a pass in which it has nothing to do."""
    nothing = torch.zeros((1, 0), dtype=torch.int64, device=device)
    return Batch(Pack(nothing, nothing), [], nothing.view(0, 1), [])


def portion(
    batch: Batch, segments: Sequence[Segment], context: dist.ProcessGroup | None, count: int
) -> Portion:
    """This rank's part of a pass that is padded to `count` tokens."""
    device = batch.pack.tokens.device
    total = batch.pack.tokens.shape[1]
    ranks = 1 if context is None else context.size()
    padding = count - total
    lengths = [*batch.lengths, padding] if padding else list(batch.lengths)
    tokens = F.pad(batch.pack.tokens, (0, padding))
    places = F.pad(batch.pack.positions, (0, padding))
    targets = F.pad(batch.targets, (0, 0, 0, padding))
    if context is None or ranks == 1:
        packing = Packing(PackedLayout(lengths), places[0])
        return Portion(tokens, places, targets, packing, list(segments), total, None, None, None)
    rank = context.rank()
    rows = rows_of(count, ranks, rank).to(device)
    layout = ContextLayout(lengths, context, device)
    own = list(_within(segments, chunks_of(count, ranks, rank)))
    packing = Packing(layout, places[0, rows])
    return Portion(
        tokens[:, rows], places[:, rows], targets[rows], packing, own, total, rows, layout.order, context
    )


def pooled(
    segments: Mapping[int, Sequence[Segment]], members: Sequence[Place], count: int
) -> Iterator[Segment]:
    """The segments among the rows that `members` compute of a pass, one member's after the other's.

    `segments` are those of each data rank's pass, which is padded to `count` tokens.
    """
    layout = members[0].layout
    each = count // layout.context
    own = each // layout.tensor if layout.sequence else each
    for number, member in enumerate(members):
        held: Sequence[Segment] = segments[member.data]
        if layout.context > 1:
            held = list(_within(held, chunks_of(count, layout.context, member.context)))
        first = member.tensor * own if layout.sequence else 0
        for segment in _within(held, [slice(first, first + own)]):
            shift = number * own
            yield segment._replace(start=segment.start + shift, stop=segment.stop + shift)


def _within(segments: Sequence[Segment], chunks: Sequence[slice]) -> Iterator[Segment]:
    """What of the segments lies in chunks of the pass that stand one after the other."""
    before = 0
    for chunk in chunks:
        for segment in segments:
            start, stop = max(segment.start, chunk.start), min(segment.stop, chunk.stop)
            if start < stop:
                shift = before - chunk.start
                yield segment._replace(start=start + shift, stop=stop + shift)
        before += chunk.stop - chunk.start
