"""Bands of adapters give what segment by segment gives: values, gradients of rows and of factors (CPU, float32)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from engines.operations import LoraSpec
from engines.tuning.grouped import GroupedLinear, GroupedRouting, takes_groups
from engines.tuning.lora import ANCHOR, Adapter, Gradient, LoraLinear, Routing, Segment, Site, size

SITES = [
    Site("model.layers.0.self_attn.q_proj", 16, 24),
    Site("model.layers.0.mlp.up_proj", 16, 8),
    Site("lm_head", 16, 40),
]
ROWS = 30


def random(spec: LoraSpec, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(SITES, spec, torch.randn(size(SITES, spec), generator=generator) * 0.3)


def passed(
    kind: type[LoraLinear], routing: Routing, parts: Sequence[tuple[Adapter, int, int]], *, site: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient by the rows, and each segment's own gradient, of one layer and the same numbers every time."""
    torch.manual_seed(3)
    linear = nn.Linear(16, SITES[site].out_features).requires_grad_(False)
    rows = torch.randn(1, ROWS, 16, requires_grad=True)
    slope = torch.randn(1, ROWS, SITES[site].out_features)
    layer = kind(linear, site, routing)
    segments = [Segment(adapter, start, stop, Gradient(adapter)) for adapter, start, stop in parts]
    with routing.along(segments):
        out = layer(rows)
        (by_rows, _) = torch.autograd.grad(out, (rows, ANCHOR), slope, allow_unused=True)
    gradients = [segment.gradient.values for segment in segments if segment.gradient is not None]
    return out.detach(), by_rows, gradients


LIKE = [random(LoraSpec(8, 0), seed) for seed in range(3)]
OTHERS = [random(LoraSpec(16, 0), 3), random(LoraSpec(8, 0, alpha=8.0), 4)]
NARROW = random(LoraSpec(4, 0), 5)
ELSEWHERE = random(LoraSpec(8, 0, train_attn=False), 6)

CASES: dict[str, list[tuple[Adapter, int, int]]] = {
    "one run": [(LIKE[0], 0, 30)],
    "one run in the middle": [(LIKE[0], 5, 17)],
    "three alike": [(LIKE[0], 0, 4), (LIKE[1], 4, 21), (LIKE[2], 21, 30)],
    "a gap": [(LIKE[0], 0, 4), (LIKE[1], 4, 9), (LIKE[2], 12, 30)],
    "ranks and scales": [(LIKE[0], 0, 4), (LIKE[1], 4, 9), (OTHERS[0], 9, 15), (OTHERS[1], 15, 30)],
    "a rank that is not aligned": [(LIKE[0], 0, 4), (NARROW, 4, 9), (LIKE[1], 9, 15), (LIKE[2], 15, 30)],
    "one that attaches elsewhere": [(ELSEWHERE, 0, 4), (LIKE[0], 4, 9), (LIKE[1], 9, 30)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("site", [0, 1])
def test_bands_compute_what_segments_do(case: str, site: int) -> None:
    plain = passed(LoraLinear, Routing(), CASES[case], site=site)
    grouped = passed(GroupedLinear, GroupedRouting(torch.float32), CASES[case], site=site)
    torch.testing.assert_close(grouped, plain, rtol=1e-5, atol=1e-5)
    assert any(gradient.any() for gradient in plain[2])


def test_neighbours_of_one_shape_are_one_band() -> None:
    routing = GroupedRouting(torch.float32)
    parts = CASES["a rank that is not aligned"]
    with routing.along([Segment(adapter, start, stop) for adapter, start, stop in parts]):
        assert [band.rows for band in routing.bands] == [slice(0, 4), slice(9, 30)]
        assert [segment.start for segment in routing.loose] == [4]
    assert not routing.bands and not routing.loose


def test_without_gradient_it_is_the_same() -> None:
    parts = CASES["three alike"]
    torch.manual_seed(3)
    linear, rows = nn.Linear(16, 24), torch.randn(ROWS, 16)
    segments = [Segment(adapter, start, stop) for adapter, start, stop in parts]
    found = []
    for kind, routing in ((LoraLinear, Routing()), (GroupedLinear, GroupedRouting(torch.float32))):
        layer = kind(linear, 0, routing)
        with torch.no_grad(), routing.along(segments):
            found.append(layer(rows))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_context_within_a_context_of_the_same_segments_changes_nothing() -> None:
    adapter = LIKE[0]
    for routing in (Routing(), GroupedRouting(torch.float32)):
        segments = [Segment(adapter, 0, 3)]
        with routing.along(segments):
            with routing.along(segments):
                assert routing.at(0)
            assert routing.at(0)
        assert not routing.at(0)


def test_only_what_never_changes_is_kept_stacked() -> None:
    routing = GroupedRouting(torch.float32)
    adapters = [random(LoraSpec(8, 0), seed) for seed in (10, 11)]
    segments = [Segment(adapter, 5 * i, 5 * i + 5) for i, adapter in enumerate(adapters)]
    seen = []
    for step in range(4):
        for adapter in adapters:
            adapter.fixed = step > 1
            adapter.values.add_(1.0)
        with routing.along(segments):
            seen.append(routing.bands[0].values.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    routing.forget()
    with routing.along(segments):
        assert torch.equal(routing.bands[0].values, torch.stack([adapter.values for adapter in adapters]))


def test_bands_are_for_devices_with_kernels_to_launch() -> None:
    assert not takes_groups([torch.zeros(8, 8)])
    assert not takes_groups([torch.zeros(8, 8, dtype=torch.bfloat16)])
