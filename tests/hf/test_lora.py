"""Adapters in memory, and the linear layer that applies several of them to one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from engines.adapters import initial_a
from engines.hf.samples import segments_of
from engines.operations import LoraSpec
from engines.tuning.lora import (
    ANCHOR,
    Adapter,
    Gradient,
    LoraLinear,
    Routing,
    Segment,
    Site,
    folds,
    pieces_at,
    size,
)
from engines.tuning.packed_attention import PackedLayout
from tests.hf.conftest import MakeEngine
from tests.hf.material import difference, text

SITES = [
    Site("model.layers.0.self_attn.q_proj", 6, 10),
    Site("model.layers.0.mlp.up_proj", 6, 7),
    Site("lm_head", 6, 20),
]


def random(spec: LoraSpec, sites: list[Site], seed: int) -> Adapter:
    """An adapter none of whose factors is zero."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(sites, spec, torch.randn(size(sites, spec), generator=generator) * 0.3)


def test_factors_are_views_of_the_values() -> None:
    adapter = random(LoraSpec(rank=3, seed=0), SITES, 1)
    assert adapter.values.shape == (3 * (16 + 13 + 26),)
    copy = adapter.copy()
    first = adapter.factors[0]
    assert first is not None and (first.a.shape, first.b.shape) == ((3, 6), (10, 3))
    adapter.values.zero_()
    assert not first.a.any() and not first.b.any()
    assert copy.values.any()


@pytest.mark.parametrize(
    ("parts", "attached"),
    [
        ((True, False, False), [0]),
        ((False, True, False), [1]),
        ((False, False, True), [2]),
        ((True, True, True), [0, 1, 2]),
    ],
)
def test_an_adapter_attaches_where_it_is_asked_to(
    parts: tuple[bool, bool, bool], attached: list[int]
) -> None:
    adapter = random(LoraSpec(2, 0, 32.0, *parts), SITES, 1)
    assert [i for i, pair in enumerate(adapter.factors) if pair is not None] == attached
    pairs = [pair for pair in adapter.factors if pair is not None]
    assert sum(factor.numel() for pair in pairs for factor in pair) == adapter.values.numel()


def test_a_fresh_adapter_holds_the_shared_initial_numbers() -> None:
    adapter = Adapter.initial(SITES, LoraSpec(rank=3, seed=17), torch.device("cpu"))
    for site, pair in zip(SITES, adapter.factors, strict=True):
        assert pair is not None
        np.testing.assert_array_equal(pair.a.numpy(), initial_a(17, site.name, 3, site.in_features))
        assert not pair.b.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_segment_gets_its_own_adapter(bias: bool, dtype: torch.dtype) -> None:
    """Rows of two adapters of different ranks, of one that does not attach here, and of none: values and gradients."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, bias=bias).to(dtype).requires_grad_(False)
    routing = Routing()
    layer = LoraLinear(linear, 0, routing)
    first, second = random(LoraSpec(3, 0, 6.0), SITES, 1), random(LoraSpec(5, 0), SITES, 2)
    absent = random(LoraSpec(2, 0, train_attn=False), SITES, 3)
    sums = [Gradient(adapter) for adapter in (first, second, absent)]
    segments = [
        Segment(first, 0, 4, sums[0]),
        Segment(second, 6, 9, sums[1]),
        Segment(absent, 9, 11, sums[2]),
    ]
    x = torch.randn(1, 12, 6).to(dtype).requires_grad_(True)
    upstream = torch.randn(1, 12, 10).to(dtype)
    variables = [x]

    expected = linear(x).float()
    parts = []
    for adapter, start, stop, _ in segments[:2]:
        pair = adapter.factors[0]
        assert pair is not None
        a, b = (factor.clone().requires_grad_(True) for factor in pair)
        variables += [a, b]
        parts.append((start, stop, adapter.scale * x[:, start:stop].float() @ a.t() @ b.t()))
    for start, stop, delta in parts:
        expected = torch.cat(
            [expected[:, :start], expected[:, start:stop] + delta, expected[:, stop:]], dim=1
        )
    expected_grads = torch.autograd.grad((expected * upstream.float()).sum(), variables)

    with routing.along(segments):
        found = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), found.detach())
    assert found.dtype == dtype
    grads = [*torch.autograd.grad((found * upstream).sum(), x, retain_graph=True)]
    grads += [factor for own in sums[:2] for factor in own.factors[0] or ()]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert difference(grad.float(), reference.float()) <= tolerance
    assert not sums[2].values.any()
    assert torch.equal(layer(x), linear(x))
    torch.autograd.grad((found * upstream).sum(), ANCHOR, allow_unused=True)
    for grad, reference in zip(grads[1:], expected_grads[1:], strict=True):
        assert difference(grad, 2 * reference) <= tolerance  # added, and without a gradient of the rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_rows_gradient", [True, False])
def test_an_adapter_of_all_of_many_rows_is_added_to_the_weight(bias: bool, with_rows_gradient: bool) -> None:
    """Values and gradients as autograd finds them for the two products written out."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, bias=bias).requires_grad_(False)
    routing = Routing()
    layer = LoraLinear(linear, 0, routing)
    adapter = random(LoraSpec(3, 0, 6.0), SITES, 1)
    own = Gradient(adapter)
    segments = [Segment(adapter, 0, 20, own)]
    x = torch.randn(1, 20, 6, requires_grad=with_rows_gradient)
    upstream = torch.randn(1, 20, 10)
    pair = adapter.factors[0]
    assert pair is not None
    assert folds(x[0], linear.weight, pieces_at(segments, 0))

    a, b = (factor.clone().requires_grad_(True) for factor in pair)
    expected = linear(x) + adapter.scale * x @ a.t() @ b.t()
    variables = [x, a, b] if with_rows_gradient else [a, b]
    wanted = torch.autograd.grad((expected * upstream).sum(), variables)

    with routing.along(segments):
        found = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), found.detach())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    asked = [x, ANCHOR] if with_rows_gradient else [ANCHOR]
    grads = torch.autograd.grad((found * upstream).sum(), asked, allow_unused=True)
    found_grads = [*grads[: len(asked) - 1], *(own.factors[0] or ())]
    for grad, reference in zip(found_grads, wanted, strict=True):
        assert difference(grad, reference) <= 1e-5


def test_a_weight_is_left_as_it_is_for_few_rows_for_several_adapters_and_in_bfloat16() -> None:
    adapter, other = random(LoraSpec(3, 0), SITES, 1), random(LoraSpec(3, 0), SITES, 2)
    weight, rows = torch.randn(10, 6), torch.randn(20, 6)
    alone = pieces_at([Segment(adapter, 0, 20)], 0)
    assert folds(rows, weight, alone)
    assert not folds(rows[:14], weight, pieces_at([Segment(adapter, 0, 14)], 0))
    assert not folds(rows, weight, pieces_at([Segment(adapter, 0, 19)], 0))
    assert not folds(rows, weight, pieces_at([Segment(adapter, 0, 10), Segment(other, 10, 20)], 0))
    assert not folds(rows.bfloat16(), weight.bfloat16(), alone)


def test_segments_of_neighbours_are_joined() -> None:
    a, b = random(LoraSpec(2, 0), SITES, 1), random(LoraSpec(2, 0), SITES, 2)
    found = segments_of([a, a, None, a, b, None, b], [1, 2, 3, 1, 1, 1, 2])
    assert found == [Segment(a, 0, 3), Segment(a, 6, 7), Segment(b, 7, 8), Segment(b, 9, 11)]


def test_runs_in_one_pass_equal_runs_alone(make_engine: MakeEngine) -> None:
    """A whole model, several adapters and the base model in one packed pass, with gradients."""
    base = make_engine("untied").base
    adapters = [
        random(LoraSpec(4, 0), base.sites, 1),
        None,
        random(LoraSpec(2, 0, train_mlp=False), base.sites, 2),
    ]
    sequences = [text(seed, length) for seed, length in enumerate((9, 4, 13))]
    lengths = [len(tokens) for tokens in sequences]
    targets = torch.tensor(np.concatenate([np.roll(tokens, -1) for tokens in sequences]).astype(np.int64))[
        :, None
    ]

    def passed(members: list[int], wanted: torch.Tensor, sums: list[Gradient | None]) -> torch.Tensor:
        own = [lengths[i] for i in members]
        segments = [
            Segment(adapter, start, stop, sums[adapters.index(adapter)])
            for adapter, start, stop, _ in segments_of([adapters[i] for i in members], own)
        ]
        hidden = base.hidden(base.pack([sequences[i] for i in members]), PackedLayout(own), segments)
        found = base.unembedding.logprobs(hidden, wanted, segments)
        torch.autograd.grad(found.square().sum(), ANCHOR, allow_unused=True)
        return found.detach()

    grads, references = (
        [None if adapter is None else Gradient(adapter) for adapter in adapters] for _ in range(2)
    )
    together = passed([0, 1, 2], targets, grads)
    alone = [passed([i], wanted, references) for i, wanted in enumerate(targets.split(lengths))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    for grad, reference in zip(grads, references, strict=True):
        if grad is not None and reference is not None:
            assert reference.values.any()
            assert difference(grad.values, reference.values) <= 1e-5
