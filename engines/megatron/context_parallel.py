"""Sequences spread over context parallel ranks: who holds which tokens, and attention among them.

A pack is cut into twice as many chunks as there are ranks; a rank holds one from the front and its counterpart from the
back, so that a long causal sequence is as much work for each (as in Llama 3's training, arXiv:2407.21783, section
3.3.2). Keys and values are gathered, queries stay: a rank attends from its own tokens to all before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engines.ranks.collectives import gather, scatter_sum
from engines.tuning.packed_attention import causal_varlen, fits_varlen

_CPU = torch.device("cpu")


def chunks_of(total: int, ranks: int, rank: int) -> tuple[slice, slice]:
    """The tokens of a pack that a rank holds. Raises ValueError when 2 * ranks does not divide their number."""
    size, rest = divmod(total, 2 * ranks)
    if rest:
        raise ValueError(f"a pack of {total} tokens is not cut into {2 * ranks} equal chunks: pad it")
    back = 2 * ranks - 1 - rank
    return slice(rank * size, (rank + 1) * size), slice(back * size, (back + 1) * size)


def rows_of(total: int, ranks: int, rank: int) -> Tensor:
    """Positions in the pack of a rank's tokens, in the order in which it holds them; int64 [total / ranks]."""
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks_of(total, ranks, rank)])


class Stretch(NamedTuple):
    """Tokens of one sequence within one chunk: rows [start, stop) of the rank, which attend to keys [first, last) of
    the pack, the last row to all of them."""

    start: int
    stop: int
    first: int
    last: int


def stretches(lengths: Sequence[int], ranks: int, rank: int) -> Iterator[Stretch]:
    """What a rank attends from, of sequences that lie one after the other and fill the pack."""
    bounds = [0, *accumulate(lengths)]
    before = 0
    for chunk in chunks_of(bounds[-1], ranks, rank):
        for begin, end in pairwise(bounds):
            start, stop = max(begin, chunk.start), min(end, chunk.stop)
            if start < stop:
                shift = before - chunk.start
                yield Stretch(start + shift, stop + shift, begin, stop)
        before += chunk.stop - chunk.start


class ContextLayout:
    """Causal attention within each of several sequences of a pack whose tokens are spread over a group of ranks.

    A `engines.tuning.packed_attention.Layout` of the rank's own tokens; every rank of the group must call it.
    """

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup, device: torch.device = _CPU) -> None:
        """`lengths` fill the pack; their sum is a multiple of twice the ranks. `device` is the tokens'."""
        self.group = group
        ranks = group.size()
        total = sum(lengths)
        self.stretches = list(stretches(lengths, ranks, group.rank()))
        self.order = torch.cat([rows_of(total, ranks, rank) for rank in range(ranks)]).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """`query` [1, heads, t, dim], `key` and `value` [1, key/value heads, t, dim] of the rank's own tokens; gives
        [1, t, heads, dim]."""
        both = torch.cat([key, value], dim=-1)[0].transpose(0, 1)
        keys, values = gather_rows(both, self.order, self.group).split([key.shape[-1], value.shape[-1]], -1)
        rows = query[0].transpose(0, 1)
        if fits_varlen(query):
            return self._at_once(rows, keys, values, scale)[None]
        parts = [_attend_from(one, rows, keys, values, scale) for one in self.stretches]
        return torch.cat(parts)[None]

    def _at_once(self, rows: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """One call for all stretches. Keys of a sequence that two of them see stand there twice."""
        seen = [slice(one.first, one.last) for one in self.stretches]
        sizes = [one.stop - one.start for one in self.stretches]
        spans = [one.stop - one.start for one in seen]
        starts, firsts = (
            torch.tensor([0, *accumulate(some)], dtype=torch.int32, device=rows.device)
            for some in (sizes, spans)
        )
        return causal_varlen(  # the last row of a stretch sees all of its keys
            rows.contiguous(),
            torch.cat([keys[own] for own in seen]),
            torch.cat([values[own] for own in seen]),
            (starts, firsts),
            (max(sizes), max(spans)),
            scale,
        )


def _attend_from(stretch: Stretch, rows: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """[tokens, heads, dim] of one stretch, from rows [t, heads, dim] and keys and values [T, key/value heads, dim]."""
    start, stop, first, last = stretch
    query = rows[start:stop].transpose(0, 1)[None]
    key, value = (tensor[first:last].transpose(0, 1)[None] for tensor in (keys, values))
    count, span = stop - start, last - first
    whole = count == span
    mask = None if whole else torch.ones(count, span, dtype=torch.bool, device=rows.device).tril(span - count)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=whole,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def gather_rows(own: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows [t, ...] as those of the pack [T, ...]; `order` says where each row belongs, one rank's after the
    other's. Backward sums what all ranks have for a row, on the rank that holds it."""
    apply: Callable[..., Tensor] = _GatherRows.apply
    return apply(own, order, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.order = order
        gathered = gather(own, group)
        pack = torch.empty_like(gathered)
        pack[order] = gathered
        return pack

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(grad[ctx.order], ctx.group), None, None
