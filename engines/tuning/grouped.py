"""Adapters of many runs in few kernels, for devices that a kernel for each run and layer would leave waiting.

Neighbouring segments whose adapters are of one shape are a band: their values are stacked, rounded to the base model's
type once a pass, and each product with a factor is one grouped matrix product over all of them. Products are
accumulated in float32 and rounded to the base's type, as `torch.autocast` has them, so also a run's gradient of a pass
where it is not alone in its band; values, sums of gradients and the optimizer stay float32.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engines.operations import LoraSpec
from engines.tuning.lora import (
    ANCHOR,
    Adapter,
    Factors,
    LoraLinear,
    Piece,
    Routing,
    Segment,
    add_deltas,
    add_gradients,
    add_product,
    factored,
    pieces_at,
    views,
)
from engines.tuning.transfer import to_device

ALIGNED = 8
"""Items of 16 bits of which rows must be multiples: grouped products read 16 bytes at a time."""
KEPT_STACKS = 4
"""Stacks of adapters that never change, those of the last passes, which are not made again."""


def takes_groups(weights: Iterable[Tensor]) -> bool:
    """Whether bands are faster on layers of these weights [out, in] than segment by segment: where the device would
    wait for its kernels' launches."""
    return all(
        weight.is_cuda and weight.dtype == torch.bfloat16 and not any(size % ALIGNED for size in weight.shape)
        for weight in weights
    )


class Band:
    """Neighbouring rows of a pass, of adapters that differ in nothing but their numbers.

    `factors[site]` are stacked: A [G, rank, in], B [G, out, rank], or None.
    """

    def __init__(
        self, like: Adapter, values: Tensor, ends: Tensor, rows: slice, segments: Sequence[Segment]
    ) -> None:
        """Of as many adapters like this one as there are `values` [G, size]; `ends`, int32 [G] on the device, are their
        last rows, counted from the first of the band."""
        self.like = like
        self.values = values
        self.ends = ends
        self.rows = rows
        self.segments = segments
        self.scale = like.scale
        self.factors = _stacked(like, values)
        self.alone = values.shape[0] == 1
        self.gradient: Tensor | None = None
        self._shares: list[Factors | None] = []

    @classmethod
    def of_segments(cls, segments: Sequence[Segment], values: Tensor) -> Band:
        """Of neighbours, whose adapters' values are given stacked."""
        start, stop = segments[0].start, segments[-1].stop
        ends = torch.tensor([segment.stop - start for segment in segments], dtype=torch.int32)
        return cls(segments[0].adapter, values, to_device(ends, values.device), slice(start, stop), segments)

    @classmethod
    def of_table(cls, like: Adapter, values: Tensor, ends: Tensor, rows: int) -> Band:
        """Of the first rows of a pass without gradient; values and ends may change between passes."""
        return cls(like, values, ends, slice(0, rows), ())

    @property
    def trained(self) -> bool:
        return bool(self.segments) and self.segments[0].gradient is not None

    def share(self, site: int) -> Factors:
        """Where the gradients of the stacked factors of a site go, float32."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.values, dtype=torch.float32)
            self._shares = _stacked(self.like, self.gradient)
        share = self._shares[site]
        assert share is not None
        return share

    def settle(self) -> None:
        """Add what the way back has left to the gradients of the segments."""
        if self.gradient is not None:
            own = [segment.gradient.values for segment in self.segments if segment.gradient is not None]
            torch._foreach_add_(own, list(self.gradient.unbind()))
            self.gradient = None


class GroupedRouting(Routing):
    """`Routing` that also tells the bands of the pass at hand, and the segments that belong to none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.bands: list[Band] = []
        self.loose: list[Segment] = []
        self._kept: OrderedDict[tuple[weakref.ref[Adapter], ...], Tensor] = OrderedDict()

    @contextmanager
    def along(self, segments: Sequence[Segment]) -> Iterator[None]:
        """At the end of the context, gradients are with the segments."""
        if segments is self.segments:  # within a context of the same
            yield
            return
        before = self.bands, self.loose
        with super().along(segments):
            self._sort(segments)
            try:
                yield
                for band in self.bands:
                    band.settle()
            finally:
                self.bands, self.loose = before

    @contextmanager
    def along_bands(self, bands: Sequence[Band]) -> Iterator[None]:
        """Within the context, layers apply these bands; nothing goes back."""
        before, self.bands = self.bands, list(bands)
        try:
            yield
        finally:
            self.bands = before

    def forget(self) -> None:
        self._kept.clear()

    def _sort(self, segments: Sequence[Segment]) -> None:
        self.bands, self.loose = [], []
        for aligned, some in groupby(
            _bands(segments), key=lambda own: band_shape(own[0].adapter) is not None
        ):
            for own in some:
                if aligned:
                    self.bands.append(Band.of_segments(own, self._stack(own)))
                else:
                    self.loose.extend(own)

    def _stack(self, segments: Sequence[Segment]) -> Tensor:
        """The adapters' values [G, size] in the base model's type."""
        if not all(segment.adapter.fixed for segment in segments):
            return _copied(segments, self.dtype)
        key = tuple(
            weakref.ref(segment.adapter) for segment in segments
        )  # equal to one of the same adapters alone
        if key not in self._kept:
            self._kept[key] = _copied(segments, self.dtype)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_STACKS:
            self._kept.popitem(last=False)
        return self._kept[key]


class GroupedLinear(LoraLinear):
    """`LoraLinear` that applies bands."""

    routing: GroupedRouting

    def forward(self, x: Tensor) -> Tensor:
        routing, site = self.routing, self.site
        parts = [Part(band, own) for band in routing.bands if (own := band.factors[site]) is not None]
        pieces = pieces_at(routing.loose, site) if routing.loose else []
        if not (parts or pieces):
            return F.linear(x, self.base.weight, self.base.bias)
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _GroupedLinear.apply
            out = apply(rows, ANCHOR, self.base.weight, self.base.bias, site, parts, pieces)
        else:
            out = F.linear(rows, self.base.weight, self.base.bias)
            for part in parts:
                _add_delta(out, rows, part)
            add_deltas(out, rows, pieces)
        return out.view(*x.shape[:-1], out.shape[-1])


class Part(NamedTuple):
    """A band seen from one site."""

    band: Band
    factors: Factors


class _GroupedLinear(torch.autograd.Function):
    """`rows @ W.T + bias` and the deltas of all bands as one node of the graph. W and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: int,
        parts: list[Part],
        pieces: list[Piece],
    ) -> Tensor:
        out = F.linear(rows, weight, bias)
        inner = [_add_delta(out, rows, part) for part in parts] + add_deltas(out, rows, pieces)
        ctx.site, ctx.parts, ctx.pieces = site, parts, pieces
        ctx.save_for_backward(rows, weight, *inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *inner = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = grad @ weight if ctx.needs_input_grad[0] else None
        for part, hidden in zip(ctx.parts, inner, strict=False):
            _go_back(ctx.site, part, rows, grad, hidden, grad_rows)
        for piece, hidden in zip(ctx.pieces, inner[len(ctx.parts) :], strict=True):
            own = slice(piece.start, piece.stop)
            grad_inner = add_gradients(factored(grad[own]), factored(rows[own]), hidden, piece)
            if grad_rows is not None:
                add_product(grad_rows[own], grad_inner, piece.factors.a, piece.scale)
        return (grad_rows, None, None, None, None, None, None)


def _add_delta(out: Tensor, rows: Tensor, part: Part) -> Tensor:
    """Add `scale * rows @ A.T @ B.T` to the band's part of `out`; gives `rows @ A.T`, [rows of the band, rank]."""
    band, (a, b) = part
    own = out[band.rows]
    if band.alone:
        hidden = rows[band.rows] @ a[0].t()
        own.addmm_(hidden, b[0].t(), alpha=band.scale)
        return hidden
    hidden = F.grouped_mm(rows[band.rows], a.transpose(1, 2), offs=band.ends)
    own.add_(F.grouped_mm(hidden, b.transpose(1, 2), offs=band.ends), alpha=band.scale)
    return hidden


def _go_back(
    site: int, part: Part, rows: Tensor, grad: Tensor, hidden: Tensor, grad_rows: Tensor | None
) -> None:
    """Add a band's shares to the gradients of its factors (formulas: `lora.add_gradients`) and of its rows."""
    band, (a, b) = part
    own_grad, own_rows = grad[band.rows], rows[band.rows]
    grad_hidden = own_grad @ b[0] if band.alone else F.grouped_mm(own_grad, b, offs=band.ends)
    if grad_rows is not None:
        target = grad_rows[band.rows]
        if band.alone:
            target.addmm_(grad_hidden, a[0], alpha=band.scale)
        else:
            target.add_(F.grouped_mm(grad_hidden, a, offs=band.ends), alpha=band.scale)
    if not band.trained:
        return
    if band.alone:
        gradient = band.segments[0].gradient
        share = None if gradient is None else gradient.factors[site]
        assert share is not None
        share.a.add_(_wide_product(grad_hidden.t(), own_rows), alpha=band.scale)
        share.b.add_(_wide_product(own_grad.t(), hidden), alpha=band.scale)
    else:
        share = band.share(site)
        share.a.add_(F.grouped_mm(grad_hidden.t(), own_rows, offs=band.ends), alpha=band.scale)
        share.b.add_(F.grouped_mm(own_grad.t(), hidden, offs=band.ends), alpha=band.scale)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Float32, of factors of fewer bits too."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _bands(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours without a gap whose adapters are of one shape."""
    bands: list[list[Segment]] = []
    for segment in segments:
        last = bands[-1][-1] if bands else None
        if last is not None and last.stop == segment.start and _shape(last) == _shape(segment):
            bands[-1].append(segment)
        else:
            bands.append([segment])
    return bands


def _shape(segment: Segment) -> tuple[object, ...]:
    """What the segments of a band have in common. Those with a gradient share none with those without."""
    spec = segment.adapter.spec
    return (_alike(spec), segment.gradient is None)


def _alike(spec: LoraSpec) -> LoraSpec:
    return msgspec.structs.replace(spec, seed=0)


def band_shape(adapter: Adapter) -> LoraSpec | None:
    """What adapters of one band have in common; None for one that can be in none."""
    return _alike(adapter.spec) if adapter.spec.rank % ALIGNED == 0 else None


def _copied(segments: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    first = segments[0].adapter.values
    if len(segments) == 1:
        return first.to(dtype)[None]
    stack = torch.empty((len(segments), first.numel()), dtype=dtype, device=first.device)
    torch._foreach_copy_(list(stack.unbind()), [segment.adapter.values for segment in segments])
    return stack


def _stacked(like: Adapter, values: Tensor) -> list[Factors | None]:
    """The factors of each site as views of stacked vectors [G, size] of adapters like this one."""
    found: list[Factors | None] = []
    for own in views(like.sites, like.spec, values[0]):
        found.append(None if own is None else Factors(*(_over(values, factor) for factor in own)))
    return found


def _over(values: Tensor, first: Tensor) -> Tensor:
    """What `first`, a view of the first vector, is of every one: [G, *first.shape]."""
    size = (values.shape[0], *first.shape)
    return values.as_strided(size, (values.stride(0), *first.stride()), first.storage_offset())
