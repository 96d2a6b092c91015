"""Low-rank adapters: where they attach, how one is held in memory, and the linear layer that applies many of them.

A pass is a batch of rows (tokens) in which each adapter owns contiguous segments; the rows of no segment get the base
model alone. Gradients of adapters are no business of autograd's: the backward pass adds each segment's share to a
`Gradient`, in place. A graph with a leaf for each factor of each run would cost more than small adapters' arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engines.adapters import attaches, initial_a
from engines.operations import LoraSpec
from engines.tuning.products import product


class Site(NamedTuple):
    """A linear layer that adapters may attach to, under the base model's own module name."""

    name: str
    in_features: int
    out_features: int


class Factors(NamedTuple):
    """`a` [rank, in_features] and `b` [out_features, rank], float32."""

    a: Tensor
    b: Tensor


class Adapter:
    """One adapter. All its numbers are one float32 vector, `values`; the factors are views of it.

    Copying, stepping, clipping and checking an adapter are thus single operations, whatever the number of layers.
    `factors[i]` belongs to site i of the model and is None where the adapter does not attach. Those of one that is
    `fixed` never change.
    """

    fixed = False

    def __init__(self, sites: Sequence[Site], spec: LoraSpec, values: Tensor) -> None:
        self.sites = sites
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.values = values
        self.factors = views(sites, spec, values)

    @classmethod
    def initial(cls, sites: Sequence[Site], spec: LoraSpec, device: torch.device) -> Adapter:
        """A of each site is `initial_a(seed, name, ...)`, B is zero: the adapter adds nothing yet."""
        adapter = cls(sites, spec, torch.zeros(size(sites, spec), dtype=torch.float32, device=device))
        for site, factors in zip(sites, adapter.factors, strict=True):
            if factors is not None:
                start = initial_a(spec.seed, site.name, spec.rank, site.in_features)
                factors.a.copy_(torch.from_numpy(start))
        return adapter

    def copy(self) -> Adapter:
        """The same numbers in memory of their own."""
        return Adapter(self.sites, self.spec, self.values.clone())


class Gradient:
    """A sum of gradients by the values of an adapter, laid out like these; zero at first."""

    def __init__(self, adapter: Adapter) -> None:
        self.values = torch.zeros_like(adapter.values)
        self.factors = views(adapter.sites, adapter.spec, self.values)


def size(sites: Sequence[Site], spec: LoraSpec) -> int:
    """Number of values of an adapter."""
    return sum(
        spec.rank * (site.in_features + site.out_features) for site in sites if attaches(site.name, spec)
    )


def views(sites: Sequence[Site], spec: LoraSpec, values: Tensor) -> list[Factors | None]:
    """The factors of each site as views of a vector of `size(sites, spec)` items, A before B."""
    factors: list[Factors | None] = []
    start = 0
    for site in sites:
        if not attaches(site.name, spec):
            factors.append(None)
            continue
        middle = start + spec.rank * site.in_features
        stop = middle + spec.rank * site.out_features
        a = values[start:middle].view(spec.rank, site.in_features)
        factors.append(Factors(a, values[middle:stop].view(site.out_features, spec.rank)))
        start = stop
    return factors


class Segment(NamedTuple):
    """Rows [start, stop) of a pass belong to `adapter`. A backward pass adds what they contribute to `gradient`."""

    adapter: Adapter
    start: int
    stop: int
    gradient: Gradient | None = None


class Piece(NamedTuple):
    """A segment seen from one site: its rows, the adapter's scale and factors there, and those of its gradient."""

    start: int
    stop: int
    scale: float
    factors: Factors
    gradient: Factors | None


ANCHOR = torch.zeros((), requires_grad=True)
"""What all adapted layers depend on. A backward pass towards it visits each of them; it gets no gradient itself."""
ROWS_TO_FOLD = 4
"""Numbers that go into and out of a layer, for each of its weights, from which an adapter is added to the weight."""


class Routing(threading.local):
    """Which rows of the pass at hand belong to which adapter. One object, shared by all layers of a model; each thread
    has a pass of its own."""

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()

    @contextmanager
    def along(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within the context, layers apply these segments."""
        before, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = before

    def at(self, site: int) -> list[Piece]:
        """The pieces at a site."""
        return pieces_at(self.segments, site)

    def forget(self) -> None:
        """Let go of what can be made again."""


def pieces_at(segments: Sequence[Segment], site: int) -> list[Piece]:
    """Those segments whose adapter attaches to the site."""
    pieces: list[Piece] = []
    for adapter, start, stop, gradient in segments:
        factors = adapter.factors[site]
        if factors is not None:
            own = None if gradient is None else gradient.factors[site]
            pieces.append(Piece(start, stop, adapter.scale, factors, own))
    return pieces


class LoraLinear(nn.Module):
    """A frozen linear layer plus the adapters of the pass at hand; without segments it is the layer itself."""

    def __init__(self, base: nn.Linear, site: int, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; rows are counted over the leading axes."""
        pieces = self.routing.at(self.site)
        if not pieces:
            return product(x, self.base.weight, self.base.bias)
        out = adapted(x.reshape(-1, x.shape[-1]), self.base.weight, self.base.bias, pieces)
        return out.view(*x.shape[:-1], out.shape[-1])


def adapted(rows: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """`rows @ weight.T + bias` [T, out_features] of rows [T, in_features], and what the pieces' adapters add to it."""
    if folds(rows, weight, pieces):
        return _with_folded(rows, weight, bias, pieces[0])
    if torch.is_grad_enabled():
        apply: Callable[..., Tensor] = _AdaptedLinear.apply
        return apply(rows, ANCHOR, weight, bias, pieces)
    out = product(rows, weight, bias)
    add_deltas(out, rows, pieces)
    return out


def add_deltas(out: Tensor, rows: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Add `scale * rows @ A.T @ B.T` to each piece of `out` in place.

    Returns `rows @ A.T` of each piece, which the gradient of B needs.
    """
    inner = []
    for start, stop, scale, (a, b), _ in pieces:
        own = factored(rows[start:stop])
        hidden = F.linear(own, a.to(own.dtype))
        add_product(out[start:stop], hidden, b.t(), scale)
        inner.append(hidden)
    return inner


def factored(rows: Tensor) -> Tensor:
    """Rows as products with factors take them: in float32, but on CUDA in the 16 bits that they have. There the factors
    are rounded to as many, and the sums are in float32 all the same, as with `torch.autocast`."""
    return rows if rows.is_cuda and rows.dtype == torch.bfloat16 else rows.float()


def add_gradients(grad: Tensor, rows: Tensor, inner: Tensor, piece: Piece) -> Tensor:
    """Add one piece's share to the gradients of its factors, given that of its output, its rows and `rows @ A.T`, all
    `factored`. Returns the gradient by `rows @ A.T`, but for the factor `scale`.

    d out / d A = scale * (grad @ B).T @ rows, d out / d B = scale * grad.T @ (rows @ A.T)
    """
    grad_inner = product(grad, piece.factors.b.to(grad.dtype).t())
    if piece.gradient is not None:
        add_product(piece.gradient.a, grad_inner.t(), rows.to(grad.dtype), piece.scale)
        add_product(piece.gradient.b, grad.t(), inner.to(grad.dtype), piece.scale)
    return grad_inner


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right, summed in float32; `right` is rounded to the type of `left`."""
    right = right.to(left.dtype)
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    elif out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, alpha=scale, out=out)
    else:
        out += (left @ right).mul_(scale).to(out.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """`rows @ W.T + bias` and the deltas of all pieces as one node of the graph. W and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[Piece]
    ) -> Tensor:
        out = product(rows, weight, bias)
        inner = add_deltas(out, rows, pieces)
        ctx.pieces = pieces
        ctx.save_for_backward(rows, weight, *inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *inner = ctx.saved_tensors
        grad_rows = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        for piece, hidden in zip(ctx.pieces, inner, strict=True):
            own = slice(piece.start, piece.stop)
            grad_inner = add_gradients(factored(grad[own]), factored(rows[own]), hidden, piece)
            if grad_rows is not None:
                add_product(grad_rows[own], grad_inner, piece.factors.a, piece.scale)
        return (grad_rows, None, None, None, None)


def folds(rows: Tensor, weight: Tensor, pieces: Sequence[Piece]) -> bool:
    """Whether the one adapter that all rows have is added to the weight, and not to what comes out: with many rows that
    is far less to read and write. It needs a weight that keeps a float32 sum."""
    if len(pieces) != 1 or pieces[0].stop - pieces[0].start != rows.shape[0]:
        return False
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    return rows.shape[0] * sum(weight.shape) >= ROWS_TO_FOLD * weight.numel()


def folded(weight: Tensor, piece: Piece) -> Tensor:
    """`weight + scale * B @ A`"""
    return torch.addmm(weight, piece.factors.b, piece.factors.a, alpha=piece.scale)


def _with_folded(rows: Tensor, weight: Tensor, bias: Tensor | None, piece: Piece) -> Tensor:
    if torch.is_grad_enabled():
        apply: Callable[..., Tensor] = _FoldedLinear.apply
        return apply(rows, ANCHOR, weight, bias, piece)
    return product(rows, folded(weight, piece), bias)


class _FoldedLinear(torch.autograd.Function):
    """`rows @ (W + scale * B @ A).T + bias`. The sum of the weights is made again on the way back, and not kept."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, piece: Piece
    ) -> Tensor:
        ctx.piece = piece
        ctx.save_for_backward(rows, weight)
        return product(rows, folded(weight, piece), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        piece: Piece = ctx.piece
        if piece.gradient is not None:
            add_gradients(grad, rows, product(rows, piece.factors.a), piece)
        grad_rows = product(grad, folded(weight, piece).t()) if ctx.needs_input_grad[0] else None
        return (grad_rows, None, None, None, None)
