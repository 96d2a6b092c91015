"""From hidden states to log-probs of given tokens, without ever holding the logits of a long batch.

Logits of V tokens for T rows are by far the largest tensors of a small-batch training step (3.5 GiB and their
gradient for 2,048 rows and 151,936 tokens). They are computed in chunks of rows; only each row's log-sum-exp is kept,
and the chunk is computed again in the backward pass. When all logits are few enough, they are kept instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engines.hf.lora import Segment, add_product

KEPT_LOGITS = 2**26
"""Logits (float32) that may stay in memory between forward and backward: 256 MiB."""
CHUNK_LOGITS = 2**25
"""Logits of one chunk: 128 MiB. Everything that is done to them is done in place."""
WIDENED = 2**24
"""Items of a bfloat16 weight that are held in float32 at once: 64 MiB."""


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
        for adapter, start, stop in segments:
            factors = adapter.factors[self.site]
            if factors is not None:
                inner = F.linear(hidden[start:stop].float(), factors.a)
                add_product(logits[start:stop], inner, factors.b.t(), adapter.scale)
        return logits

    def chunks(self, hidden: Tensor, segments: Sequence[Segment]) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits float32 [rows, V]) of chunk after chunk."""
        step = rows_per_chunk(self.vocabulary)
        for start in range(0, hidden.shape[0], step):
            stop = min(start + step, hidden.shape[0])
            inside = [
                Segment(adapter, max(first, start) - start, min(last, stop) - start)
                for adapter, first, last in segments
                if first < stop and last > start
            ]
            yield start, self.logits(hidden[start:stop], inside)

    def logprobs(self, hidden: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Log-probs float32 [T, K] of `targets` int64 [T, K] given `hidden` [T, H].

        Differentiable with respect to `hidden` and the factors of the segments' adapters.
        """
        spans, factors = _spans(segments, self.site, hidden.shape[0], rows_per_chunk(self.vocabulary))
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Logprobs.apply
            return apply(hidden, targets, self.weight, self.bias, spans, *factors)
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for span in spans:
            rows = slice(span.start, span.stop)
            logits = _span_logits(span, hidden[rows], self.weight, self.bias, factors)
            own = logits.gather(1, targets[rows])
            peak, total = exponentials_(logits)
            out[rows] = own.sub_(peak).sub_(total.log_())
        return out


class _Span(NamedTuple):
    """Rows [start, stop) of one chunk, all of one adapter: A and B are factors `place` and `place + 1`, -1 is none."""

    start: int
    stop: int
    place: int
    scale: float


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose logits make one chunk."""
    return max(1, CHUNK_LOGITS // vocabulary)


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


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row by exp(row - its maximum); gives the maxima and the sums of the exponentials, both [T, 1]."""
    peak = logits.amax(1, keepdim=True)
    return peak, logits.sub_(peak).exp_().sum(1, keepdim=True)


def _spans(segments: Sequence[Segment], site: int, rows: int, step: int) -> tuple[list[_Span], list[Tensor]]:
    """Cover all rows: each segment, and the gaps between segments, in chunks of at most `step` rows."""
    spans: list[_Span] = []
    factors: list[Tensor] = []
    done = 0
    for adapter, start, stop in [*segments, (None, rows, rows)]:
        pair = None if adapter is None else adapter.factors[site]
        spans += _cut(done, start, step, -1, 0.0)
        place, scale = (-1, 0.0) if pair is None or adapter is None else (len(factors), adapter.scale)
        spans += _cut(start, stop, step, place, scale)
        factors += pair or ()
        done = stop
    return spans, factors


def _cut(start: int, stop: int, step: int, place: int, scale: float) -> list[_Span]:
    return [_Span(first, min(first + step, stop), place, scale) for first in range(start, stop, step)]


def _span_logits(
    span: _Span, hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    """Logits float32 of one span."""
    logits = project(hidden, weight, bias)
    if span.place >= 0:
        a, b = factors[span.place : span.place + 2]
        add_product(logits, F.linear(hidden.float(), a), b.t(), span.scale)
    return logits


class _Logprobs(torch.autograd.Function):
    """log softmax(hidden @ W.T + adapters) at `targets`; W and bias are frozen.

    d logprob[t, k] / d logits[t] = onehot(target[t, k]) - softmax(logits[t]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: list[_Span],
        *factors: Tensor,
    ) -> Tensor:
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        norm = torch.empty((hidden.shape[0], 1), dtype=torch.float32, device=hidden.device)
        keep = hidden.shape[0] * weight.shape[0] <= KEPT_LOGITS
        ctx.kept = []
        for span in spans:
            rows = slice(span.start, span.stop)
            logits = _span_logits(span, hidden[rows], weight, bias, factors)
            own = logits.gather(1, targets[rows])
            peak, total = exponentials_(logits)
            norm[rows] = total.log() + peak
            out[rows] = own.sub_(peak).sub_(total.log())  # as without gradient, to the last bit
            if keep:
                ctx.kept.append((logits, total))
        ctx.spans = spans
        ctx.save_for_backward(hidden, targets, norm, weight, bias, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, norm, weight, bias, *factors = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grads = [torch.zeros_like(factor) for factor in factors]
        kept = iter(ctx.kept or [None] * len(ctx.spans))
        for span, held in zip(ctx.spans, kept, strict=True):
            rows = slice(span.start, span.stop)
            share = -grad[rows].sum(1, keepdim=True)
            if held is None:
                logits = _span_logits(span, hidden[rows], weight, bias, factors)
                grad_logits = logits.sub_(norm[rows]).exp_().mul_(share)
            else:
                exponentials, total = held
                grad_logits = exponentials.mul_(share / total)
            grad_logits.scatter_add_(1, targets[rows], grad[rows])
            torch.mm(grad_logits.to(weight.dtype), weight, out=grad_hidden[rows])
            if span.place >= 0:
                pair = slice(span.place, span.place + 2)
                _adapter_grads(span, grad_logits, hidden[rows], factors[pair], grads[pair], grad_hidden[rows])
        ctx.kept = None
        return (grad_hidden, None, None, None, None, *grads)


def _adapter_grads(
    span: _Span,
    grad_logits: Tensor,
    hidden: Tensor,
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    grad_hidden: Tensor,
) -> None:
    """Add one span's share to the gradients of A and B and to that of the hidden states."""
    a, b = factors
    grad_a, grad_b = grads
    rows = hidden.float()
    grad_inner = (grad_logits @ b).mul_(span.scale)
    grad_b.addmm_(grad_logits.t(), F.linear(rows, a), alpha=span.scale)
    grad_a.addmm_(grad_inner.t(), rows)
    add_product(grad_hidden, grad_inner, a, 1.0)
