"""Adapters divided among ranks: what each holds of a whole one, and how the ranks' parts become whole again.

The layout of values in memory is `engines.tuning.lora`'s, once for the whole model's sites and once for a rank's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engines.adapters import initial_a
from engines.megatron.places import Place
from engines.megatron.shapes import ModelShape
from engines.operations import LoraSpec
from engines.tuning.experts import MATRICES
from engines.tuning.lora import Adapter, Factors, Gradient, Site, size, views


class ModelSite(NamedTuple):
    """A linear layer of the whole model: in which decoder layer it is (the unembedding stands behind the last), what
    the tensor ranks divide of it, and which expert it belongs to; experts are not divided."""

    site: Site
    layer: int
    divided: Literal["outputs", "inputs", "nothing"]
    expert: int | None = None

    def share(self, ranks: int) -> Site:
        """What one of `ranks` ranks holds."""
        name, inputs, outputs = self.site
        if self.divided == "nothing":
            return self.site
        if self.divided == "outputs":
            return Site(name, inputs, outputs // ranks)
        return Site(name, inputs // ranks, outputs)


def model_sites(shape: ModelShape) -> list[ModelSite]:
    """All sites in the order of the layers: q, k, v, o, gate, up, down of each, these of each expert; the unembedding
    last."""
    sites = []
    for layer in range(shape.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, outputs in (
            ("q_proj", shape.query_width),
            ("k_proj", shape.kv_width),
            ("v_proj", shape.kv_width),
        ):
            sites.append(ModelSite(Site(f"{attention}.{name}", shape.hidden, outputs), layer, "outputs"))
        sites.append(ModelSite(Site(f"{attention}.o_proj", shape.query_width, shape.hidden), layer, "inputs"))
        if shape.experts:
            sites.extend(_expert_sites(shape, layer, f"{mlp}.experts"))
            continue
        for name in ("gate_proj", "up_proj"):
            sites.append(ModelSite(Site(f"{mlp}.{name}", shape.hidden, shape.ffn), layer, "outputs"))
        sites.append(ModelSite(Site(f"{mlp}.down_proj", shape.ffn, shape.hidden), layer, "inputs"))
    head = Site("lm_head", shape.hidden, shape.vocabulary)
    return [*sites, ModelSite(head, shape.layers, "outputs")]


def _expert_sites(shape: ModelShape, layer: int, name: str) -> Iterator[ModelSite]:
    for number in range(shape.experts):
        for matrix in MATRICES:
            sizes = (shape.ffn, shape.hidden) if matrix == "down_proj" else (shape.hidden, shape.ffn)
            yield ModelSite(Site(f"{name}.{number}.{matrix}", *sizes), layer, "nothing", number)


class Sharding:
    """The sites of the whole model, and those of one rank of it."""

    def __init__(self, shape: ModelShape, place: Place) -> None:
        self.shape = shape
        self.place = place
        self.everything = model_sites(shape)
        self.whole = [each.site for each in self.everything]
        layers, experts = place.layers(shape.layers), place.experts(shape.experts)
        self.mine = [
            each
            for each in self.everything
            if (each.layer in layers or (each.layer == shape.layers and place.is_last_stage))
            and (each.expert is None or each.expert in experts)
        ]
        self.sites = [each.share(place.layout.tensor) for each in self.mine]

    def of(self, place: Place) -> Sharding:
        """Another rank's."""
        return Sharding(self.shape, place)

    def initial(self, spec: LoraSpec, device: torch.device) -> Adapter:
        """This rank's share of a fresh adapter, which is the same on every engine and layout."""
        numbers = torch.zeros(size(self.sites, spec), dtype=torch.float32, device=device)
        adapter = Adapter(self.sites, spec, numbers)
        for each, factors in zip(self.mine, adapter.factors, strict=True):
            if factors is not None:
                start = initial_a(spec.seed, each.site.name, spec.rank, each.site.in_features)
                factors.a.copy_(self._cut_a(each, torch.from_numpy(start)))
        return adapter

    def share_of(self, whole: Tensor, spec: LoraSpec, device: torch.device) -> Tensor:
        """This rank's part of values of the whole model."""
        own = torch.zeros(size(self.sites, spec), dtype=torch.float32, device=device)
        for each, theirs, ours in self._pairs(whole, own, spec):
            ours.a.copy_(self._cut_a(each, theirs.a))
            ours.b.copy_(self._cut_b(each, theirs.b))
        return own

    def put(self, own: Tensor, whole: Tensor, spec: LoraSpec) -> None:
        """Copy this rank's part to its place among values of the whole model."""
        for each, theirs, ours in self._pairs(whole, own, spec):
            self._cut_a(each, theirs.a).copy_(ours.a)
            self._cut_b(each, theirs.b).copy_(ours.b)

    def shared(self, gradient: Gradient) -> list[Tensor]:
        """The factors that every tensor rank has: A where outputs are divided, B where inputs are."""
        return [
            pair.a if each.divided == "outputs" else pair.b
            for each, pair in zip(self.mine, gradient.factors, strict=True)
            if pair is not None and each.divided != "nothing"
        ]

    def square(self, gradient: Gradient) -> float:
        """This rank's part of the squared norm of a whole gradient. What several ranks have counts once: on the first
        copy of the model or of the experts, and what every tensor rank has on the first of them."""
        dense, experts = self.parts(gradient)
        place = self.place
        counted = [*(dense if place.is_original else ()), *(experts if place.has_original_experts else ())]
        total = torch.zeros((), dtype=torch.float64, device=gradient.values.device)
        for part in counted:
            total += _square(part)
        if place.is_original and place.tensor > 0:
            for factor in self.shared(gradient):
                total -= _square(factor)
        return max(0.0, float(total)) if torch.isfinite(total) else float(total)

    def parts(self, gradient: Gradient) -> tuple[list[Tensor], list[Tensor]]:
        """Views of all values, in as few pieces as there are: those of experts apart from the others."""
        dense, experts = self.pieces(gradient)
        return [gradient.values[piece] for piece in dense], [gradient.values[piece] for piece in experts]

    def pieces(self, held: Adapter | Gradient) -> tuple[list[slice], list[slice]]:
        """Where in the vector these are."""
        return self._pieces(
            [None if pair is None else pair.a.numel() + pair.b.numel() for pair in held.factors]
        )

    def pieces_of(self, spec: LoraSpec) -> tuple[list[slice], list[slice]]:
        """Where they are in the vector of an adapter that there is not yet."""
        return self._pieces([size([site], spec) or None for site in self.sites])

    def _pieces(self, widths: Sequence[int | None]) -> tuple[list[slice], list[slice]]:
        """Of values of so many for each site, None where nothing is attached."""
        found: tuple[list[slice], list[slice]] = ([], [])
        attached = [
            (each.expert is not None, width)
            for each, width in zip(self.mine, widths, strict=True)
            if width is not None
        ]
        start = 0
        for of_experts, some in itertools.groupby(attached, lambda pair: pair[0]):
            stop = start + sum(width for _, width in some)
            found[of_experts].append(slice(start, stop))
            start = stop
        return found

    def _pairs(
        self, whole: Tensor, own: Tensor, spec: LoraSpec
    ) -> Iterator[tuple[ModelSite, Factors, Factors]]:
        """The factors of each of this rank's sites, whole and its own."""
        named = dict(zip(self.whole, views(self.whole, spec, whole), strict=True))
        for each, ours in zip(self.mine, views(self.sites, spec, own), strict=True):
            theirs = named[each.site]
            if ours is not None and theirs is not None:
                yield each, theirs, ours

    def _cut_a(self, each: ModelSite, a: Tensor) -> Tensor:
        return self._own(a, 1) if each.divided == "inputs" else a

    def _cut_b(self, each: ModelSite, b: Tensor) -> Tensor:
        return self._own(b, 0) if each.divided == "outputs" else b

    def _own(self, whole: Tensor, axis: int) -> Tensor:
        width = whole.shape[axis] // self.place.layout.tensor
        return whole.narrow(axis, self.place.tensor * width, width)


def _square(part: Tensor) -> Tensor:
    """Its squared norm, float64 []; nothing of the part's size is made for it."""
    norm: Tensor = torch.linalg.vector_norm(part, dtype=torch.float64)
    return norm.square()


def sum_gradients(
    sharding: Sharding,
    gradients: Sequence[Gradient],
    tensor_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
    expert_copies: dist.ProcessGroup | None,
) -> None:
    """Have every rank hold the sums that belong to its factors, over the ranks that have computed parts of them.

    Of experts these are all ranks that hold them: each has seen other tokens, tensor ranks among them.
    """
    layout = sharding.place.layout
    if layout.tensor > 1:
        _sum([factor for gradient in gradients for factor in sharding.shared(gradient)], tensor_group)
    parts = [sharding.parts(gradient) for gradient in gradients]
    if layout.data * layout.context > 1:
        for dense, _ in parts:
            _sum(dense, data_group)
    if expert_copies is not None:
        for _, experts in parts:
            _sum(experts, expert_copies)


def _sum(parts: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Of each part over the ranks of a group, in place, at once."""
    if len(parts) == 1 and parts[0].is_contiguous():
        dist.all_reduce(parts[0], group=group)
    elif parts:
        together = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(together, group=group)
        for part, summed in zip(parts, together.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))
