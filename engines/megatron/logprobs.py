"""Log-probs of given tokens from hidden states, where each rank has logits of its own part of the vocabulary only.

Three numbers of each row are put together over the ranks: the largest logit, the sum of exponentials, the logits of the
targets. Neither logits nor probabilities of the whole vocabulary are ever in one place, and few rows' are at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from engines.megatron.megatron_core import mappings
from engines.ranks.collectives import combine
from engines.tuning.lora import (
    ANCHOR,
    Piece,
    Segment,
    add_deltas,
    add_gradients,
    add_product,
    factored,
    pieces_at,
)
from engines.tuning.projection import project

CHUNK_LOGITS = 2**25
"""Logits (float32) of one chunk of rows: 128 MiB."""


class Unembedding:
    """This rank's rows of the frozen last layer, tokens from `first` on, and the adapters on it."""

    def __init__(
        self, weight: Tensor, first: int, site: int, group: dist.ProcessGroup, sequence_parallel: bool
    ) -> None:
        self.weight = weight
        self.first = first
        self.site = site
        self.group = group
        self.sequence_parallel = sequence_parallel

    def logprobs(self, hidden: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Log-probs float32 [T, K] of `targets` int64 [T, K] given `hidden` [T, H], the same on every rank.

        Differentiable with respect to `hidden`; a backward pass adds to the segments' gradients.
        """
        if self.sequence_parallel:
            hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=self.group)
        pieces = pieces_at(segments, self.site)
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Logprobs.apply
            return apply(hidden, ANCHOR, targets, self, pieces)
        return self.evaluate(hidden, targets, pieces)[0]

    def evaluate(self, hidden: Tensor, targets: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Log-probs [T, K], and the logarithm of each row's sum of exponentials [T, 1]."""
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        norm = torch.empty((hidden.shape[0], 1), dtype=torch.float32, device=hidden.device)
        for rows, inside in self.chunks(pieces, hidden.shape[0]):
            logits, _ = self.logits(hidden[rows], inside)
            place, held = self.places(targets[rows])
            chosen = logits.gather(1, place).masked_fill_(~held, 0.0)
            peak = logits.amax(1, keepdim=True)
            combine(peak, self.group, dist.ReduceOp.MAX)
            total = logits.sub_(peak).exp_().sum(1, keepdim=True)
            both = torch.cat([chosen, total], dim=1)
            combine(both, self.group)
            chosen, total = both[:, :-1], both[:, -1:].log()
            norm[rows] = total + peak
            out[rows] = chosen - peak - total
        return out, norm

    def chunks(self, pieces: Sequence[Piece], rows: int) -> Iterator[tuple[slice, list[Piece]]]:
        """All rows, in chunks, and the pieces among each, whose own rows are counted from its first. The same on every
        rank, for each chunk takes collectives."""
        step = max(1, CHUNK_LOGITS // self.weight.shape[0])
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            inside = [
                piece._replace(start=max(piece.start, start) - start, stop=min(piece.stop, stop) - start)
                for piece in pieces
                if piece.start < stop and piece.stop > start
            ]
            yield slice(start, stop), inside

    def logits(self, hidden: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, list[Tensor]]:
        """This rank's logits float32 of some rows, and `hidden @ A.T` of their pieces."""
        logits = project(hidden, self.weight, None)
        return logits, add_deltas(logits, hidden, pieces)

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of targets among this rank's logits, 0 where it has none, and whether it has."""
        place = targets - self.first
        held = (place >= 0) & (place < self.weight.shape[0])
        return place.masked_fill(~held, 0), held


class _Logprobs(torch.autograd.Function):
    """log softmax at `targets`: d logprob[t, k] / d logits[t] = onehot(target[t, k]) - softmax(logits[t]).

    Logits are computed again on the way back. What a rank adds to the gradient of `hidden`, and of an adapter's A, is
    its part of a sum over the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        targets: Tensor,
        unembedding: Unembedding,
        pieces: list[Piece],
    ) -> Tensor:
        out, norm = unembedding.evaluate(hidden, targets, pieces)
        ctx.unembedding, ctx.pieces = unembedding, pieces
        ctx.save_for_backward(hidden, targets, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, norm = ctx.saved_tensors
        unembedding: Unembedding = ctx.unembedding
        grad_hidden = torch.empty_like(hidden)
        for rows, inside in unembedding.chunks(ctx.pieces, hidden.shape[0]):
            logits, inner = unembedding.logits(hidden[rows], inside)
            slope = logits.sub_(norm[rows]).exp_().mul_(-grad[rows].sum(1, keepdim=True))
            place, held = unembedding.places(targets[rows])
            slope.scatter_add_(1, place, grad[rows].masked_fill(~held, 0.0))
            narrow = slope.to(unembedding.weight.dtype)
            torch.mm(narrow, unembedding.weight, out=grad_hidden[rows])
            given = narrow if narrow.is_cuda else slope
            for piece, reduced in zip(inside, inner, strict=True):
                own = slice(piece.start, piece.stop)
                grad_inner = add_gradients(factored(given[own]), factored(hidden[rows][own]), reduced, piece)
                add_product(grad_hidden[rows][own], grad_inner, piece.factors.a, piece.scale)
        return (grad_hidden, None, None, None, None)
