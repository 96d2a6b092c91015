"""From hidden states to log-probs of given tokens, without ever holding the logits of a long batch.

Logits of V tokens for T rows are by far the largest tensors of a small-batch training step (3.5 GiB and their
gradient for 2,048 rows and 151,936 tokens). They are computed in chunks of rows; only each row's log-sum-exp is kept,
and the chunk is computed again in the backward pass. When all logits are few enough, they are kept instead. With one
target a row and no adapter on the last layer nothing is computed twice: what a row's log-prob adds to the gradient of
its hidden state is then the same direction whatever the loss, so it is computed while the chunk is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from engines.tuning.products import product
from engines.tuning.projection import project

KEPT_LOGITS = 2**26
"""Logits (float32) that may stay in memory between forward and backward: 256 MiB."""
CHUNK_LOGITS = 2**25
"""Logits of one chunk: 128 MiB. Everything that is done to them is done in place."""
CUDA_TIMES = 8
"""As many times both are allowed on CUDA, where smaller ones are over before the next are launched."""


class Unembedding:
    """The frozen last layer [V, H] and the adapters on it, which are applied here and not in a layer of their own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, site: int) -> None:
        self.weight = weight
        self.bias = bias
        self.site = site

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Logits float32 [T, V] of `hidden` [T, H]. For few rows; see `chunks` for many."""
        logits = project(hidden, self.weight, self.bias)
        add_deltas(logits, hidden, pieces_at(segments, self.site))
        return logits

    def chunks(self, hidden: Tensor, segments: Sequence[Segment]) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits float32 [rows, V]) of chunk after chunk."""
        step = rows_per_chunk(self.vocabulary, cuda=hidden.is_cuda)
        for start in range(0, hidden.shape[0], step):
            stop = min(start + step, hidden.shape[0])
            inside = [
                segment._replace(
                    start=max(segment.start, start) - start, stop=min(segment.stop, stop) - start
                )
                for segment in segments
                if segment.start < stop and segment.stop > start
            ]
            yield start, self.logits(hidden[start:stop], inside)

    def logprobs(self, hidden: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Log-probs float32 [T, K] of `targets` int64 [T, K] given `hidden` [T, H].

        Differentiable with respect to `hidden`; a backward pass adds to the segments' gradients.
        """
        step = rows_per_chunk(self.vocabulary, cuda=hidden.is_cuda)
        chunks = _chunks(pieces_at(segments, self.site), hidden.shape[0], step)
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Logprobs.apply
            return apply(hidden, ANCHOR, targets, self.weight, self.bias, chunks)
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        memory = _room(chunks, hidden, self.vocabulary)
        for chunk in chunks:
            logits, _ = _chunk_logits(chunk, hidden[chunk.rows], self.weight, self.bias, memory)
            out[chunk.rows] = logprobs_(logits, targets[chunk.rows], shares=False)
        return out


class _Chunk(NamedTuple):
    """Rows [start, stop) and the pieces among them, whose own rows are counted from the first of these."""

    start: int
    stop: int
    pieces: list[Piece]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def _chunks(pieces: Sequence[Piece], rows: int, step: int) -> list[_Chunk]:
    """All rows, in chunks: of all adapters' rows, for a small run's own are too few to use a processor well."""
    chunks = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        inside = [
            piece._replace(start=max(piece.start, start) - start, stop=min(piece.stop, stop) - start)
            for piece in pieces
            if piece.start < stop and piece.stop > start
        ]
        chunks.append(_Chunk(start, stop, inside))
    return chunks


def rows_per_chunk(vocabulary: int, *, cuda: bool = False) -> int:
    """Rows whose logits make one chunk."""
    return max(1, (CHUNK_LOGITS * CUDA_TIMES if cuda else CHUNK_LOGITS) // vocabulary)


def logprobs_(logits: Tensor, targets: Tensor, *, shares: bool = True) -> Tensor:
    """Log-probs [T, K] of `targets` [T, K]; each row of `logits` [T, V] is replaced by its softmax if `shares` are
    wanted, else by anything.

    CUDA's log-softmax passes over memory less often. Elsewhere exponentials are dear, and one pass of them is enough:
    the softmax of the largest logit is one by the sum of exp(logit - largest), so its logarithm is what the row lacks;
    a target's own may be too small for a logarithm.
    """
    if logits.is_cuda:
        torch.log_softmax(logits, 1, out=logits)
        found = logits.gather(1, targets)
        if shares:
            logits.exp_()
        return found
    own = logits.gather(1, targets)
    own.sub_(logits.amax(1, keepdim=True))
    torch.softmax(logits, 1, out=logits)
    return own.add_(logits.amax(1, keepdim=True).log_())


def _room(chunks: Sequence[_Chunk], hidden: Tensor, vocabulary: int) -> Tensor:
    """Memory for the logits of any of the chunks, which take turns."""
    most = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return hidden.new_empty((most, vocabulary), dtype=torch.float32)


def _chunk_logits(
    chunk: _Chunk, hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits float32 of one chunk, in `memory` if given, and `hidden @ A.T` of its pieces."""
    logits = project(hidden, weight, bias, None if memory is None else memory[: hidden.shape[0]])
    return logits, add_deltas(logits, hidden, chunk.pieces)


class _Logprobs(torch.autograd.Function):
    """log softmax(hidden @ W.T + adapters) at `targets`; W and bias are frozen.

    d logprob[t, k] / d logits[t] = onehot(target[t, k]) - softmax(logits[t]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunks: list[_Chunk],
    ) -> Tensor:
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        most = KEPT_LOGITS * CUDA_TIMES if hidden.is_cuda else KEPT_LOGITS
        keep = hidden.shape[0] * weight.shape[0] <= most
        direct = not keep and targets.shape[1] == 1 and not any(chunk.pieces for chunk in chunks)
        ctx.kept = []
        ctx.slopes = torch.empty_like(hidden) if direct else None
        memory = None if keep else _room(chunks, hidden, weight.shape[0])
        for chunk in chunks:
            shares, inner = _chunk_logits(chunk, hidden[chunk.rows], weight, bias, memory)
            # as without gradient, to the last bit
            out[chunk.rows] = logprobs_(shares, targets[chunk.rows], shares=keep or direct)
            if keep:
                ctx.kept.append((shares, inner))
            elif direct:
                _slopes(shares, targets[chunk.rows], weight, ctx.slopes[chunk.rows])
        ctx.chunks = chunks
        ctx.save_for_backward(hidden, targets, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias = ctx.saved_tensors
        if ctx.slopes is not None:
            grad_hidden = ctx.slopes.mul_(grad)
            ctx.slopes = None
            return (grad_hidden, None, None, None, None, None)
        grad_hidden = torch.empty_like(hidden)
        memory = None if ctx.kept else _room(ctx.chunks, hidden, weight.shape[0])
        kept = iter(ctx.kept or [None] * len(ctx.chunks))
        for chunk, held in zip(ctx.chunks, kept, strict=True):
            rows = chunk.rows
            share = -grad[rows].sum(1, keepdim=True)
            if held is None:
                logits, inner = _chunk_logits(chunk, hidden[rows], weight, bias, memory)
                shares = torch.softmax(logits, 1, out=logits)
            else:
                shares, inner = held
            grad_logits = shares.mul_(share)
            grad_logits.scatter_add_(1, targets[rows], grad[rows])
            narrow = grad_logits.to(weight.dtype)
            grad_hidden[rows] = product(narrow, weight.t())
            given = narrow if narrow.is_cuda else grad_logits
            _add_adapters(chunk, given, hidden[rows], inner, grad_hidden[rows])
        ctx.kept = None
        return (grad_hidden, None, None, None, None, None)


def _slopes(shares: Tensor, targets: Tensor, weight: Tensor, out: Tensor) -> None:
    """d logprob[t] / d hidden[t] of rows with one target [T, 1] each, given `shares`, their softmax [T, V]."""
    shares.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=shares.dtype))
    torch.mm(shares.to(weight.dtype), weight, out=out).neg_()


def _add_adapters(
    chunk: _Chunk, grad_logits: Tensor, hidden: Tensor, inner: Sequence[Tensor], grad_hidden: Tensor
) -> None:
    """Add what one chunk contributes to its adapters' gradients, and what these do to that of the hidden states."""
    for piece, reduced in zip(chunk.pieces, inner, strict=True):
        own = slice(piece.start, piece.stop)
        grad_inner = add_gradients(factored(grad_logits[own]), factored(hidden[own]), reduced, piece)
        add_product(grad_hidden[own], grad_inner, piece.factors.a, piece.scale)
