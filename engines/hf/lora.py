"""Low-rank adapters: where they attach, how one is held in memory, and the linear layer that applies many of them.

A pass is a batch of rows (tokens) in which each adapter owns one contiguous segment; the rows of no segment get the
base model alone. Training passes have one segment, as each holds data of one run; a decoding batch has one for each
adapter in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engines.adapters import attaches, initial_a
from engines.operations import LoraSpec


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
    `factors[i]` belongs to site i of the model and is None where the adapter does not attach.
    """

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

    def leaves(self) -> list[Tensor]:
        """A and B of each site it attaches to, in the order of `values`, ready to have gradients computed."""
        return [factor.requires_grad_(True) for pair in self.factors if pair is not None for factor in pair]

    def copy(self) -> Adapter:
        """The same numbers in memory of their own."""
        return Adapter(self.sites, self.spec, self.values.detach().clone())


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
    """Rows [start, stop) of a pass belong to `adapter`."""

    adapter: Adapter
    start: int
    stop: int


class Piece(NamedTuple):
    """A segment seen from one site: its rows and the scale of the adapter. Its factors travel beside it."""

    start: int
    stop: int
    scale: float


class Routing:
    """Which rows of the pass at hand belong to which adapter. One object, shared by all layers of a model."""

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()

    @contextmanager
    def along(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within the context, layers apply these segments."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = ()

    def at(self, site: int) -> tuple[list[Piece], list[Tensor]]:
        """The pieces at a site, and A and B of each in turn."""
        return pieces_at(self.segments, site)


def pieces_at(segments: Sequence[Segment], site: int) -> tuple[list[Piece], list[Tensor]]:
    """Those segments whose adapter attaches to the site: the pieces, and A and B of each in turn."""
    pieces: list[Piece] = []
    tensors: list[Tensor] = []
    for adapter, start, stop in segments:
        factors = adapter.factors[site]
        if factors is not None:
            pieces.append(Piece(start, stop, adapter.scale))
            tensors += factors
    return pieces, tensors


class LoraLinear(nn.Module):
    """A frozen linear layer plus the adapters of the pass at hand; without segments it is the layer itself."""

    def __init__(self, base: nn.Linear, site: int, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]; rows are counted over the leading axes."""
        pieces, factors = self.routing.at(self.site)
        if not pieces:
            return F.linear(x, self.base.weight, self.base.bias)
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _AdaptedLinear.apply
            out = apply(rows, self.base.weight, self.base.bias, pieces, *factors)
        else:
            out = F.linear(rows, self.base.weight, self.base.bias)
            add_deltas(out, rows, pieces, factors)
        return out.view(*x.shape[:-1], out.shape[-1])


def add_deltas(out: Tensor, rows: Tensor, pieces: Sequence[Piece], factors: Sequence[Tensor]) -> list[Tensor]:
    """Add `scale * rows @ A.T @ B.T` to each piece of `out` in place, computed in float32.

    Returns `rows @ A.T` of each piece, which the gradient of B needs.
    """
    inner = []
    for piece, a, b in zip(pieces, factors[::2], factors[1::2], strict=True):
        hidden = F.linear(rows[piece.start : piece.stop].float(), a)
        add_product(out[piece.start : piece.stop], hidden, b.t(), piece.scale)
        inner.append(hidden)
    return inner


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right, the product in float32."""
    if out.dtype == torch.float32:
        out.addmm_(left, right, alpha=scale)
    else:
        out += (left @ right).mul_(scale).to(out.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """`rows @ W.T + bias` and the deltas of all pieces as one node of the graph. W and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[Piece], *factors: Tensor
    ) -> Tensor:
        out = F.linear(rows, weight, bias)
        inner = add_deltas(out, rows, pieces, factors)
        ctx.pieces = pieces
        ctx.save_for_backward(rows, weight, *factors, *inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *rest = ctx.saved_tensors
        count = 2 * len(ctx.pieces)
        factors, inner = rest[:count], rest[count:]
        grad_rows = grad @ weight if ctx.needs_input_grad[0] else None
        grads: list[Tensor] = []
        for piece, a, b, hidden in zip(ctx.pieces, factors[::2], factors[1::2], inner, strict=True):
            part = grad[piece.start : piece.stop].float()
            grad_hidden = (part @ b).mul_(piece.scale)
            grads += (
                grad_hidden.t() @ rows[piece.start : piece.stop].float(),
                part.t() @ (hidden * piece.scale),
            )
            if grad_rows is not None:
                add_product(grad_rows[piece.start : piece.stop], grad_hidden, a, 1.0)
        return (grad_rows, None, None, None, *grads)
