"""Adapters in parts: cut and put together they are what they were, and norms and sums are those of the whole."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engines.adapters import initial_a
from engines.megatron.constraints import Layout
from engines.megatron.places import Place
from engines.megatron.shapes import ModelShape
from engines.megatron.sharding import Sharding, model_sites
from engines.megatron.training import share_out
from engines.operations import Datum, Forward, LoraSpec
from engines.tensors import Tensor
from engines.tuning.lora import Adapter, Gradient, size

SHAPE = ModelShape(
    family="qwen3",
    layers=4,
    hidden=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=40,
    vocabulary=64,
    tied=True,
    max_context=128,
    norm_eps=1e-6,
    rope_theta=1e4,
)
MOE = msgspec.structs.replace(SHAPE, family="qwen3_moe", ffn=16, experts=4, experts_per_token=2)
CPU = torch.device("cpu")
LAYOUTS = [
    Layout(tensor, pipeline, data) for tensor, pipeline, data in itertools.product((1, 2), (1, 2), (1, 2))
]
CUTS = [
    *((SHAPE, layout) for layout in LAYOUTS),
    (MOE, Layout()),
    (MOE, Layout(tensor=2, sequence=True)),
    (MOE, Layout(data=2, expert=2)),
    (MOE, Layout(tensor=2, data=2, expert=2, sequence=True)),
    (MOE, Layout(tensor=2, pipeline=2, data=2, expert=4, sequence=True)),
]
CUT_IDS = [f"{shape.family} {layout}" for shape, layout in CUTS]
SPECS = [
    LoraSpec(3, 5),
    LoraSpec(2, 6, train_attn=False),
    LoraSpec(2, 7, train_mlp=False, train_unembed=False),
    LoraSpec(2, 8, train_mlp=False, train_attn=False),
]


def shardings(layout: Layout, shape: ModelShape = SHAPE) -> list[Sharding]:
    """Of every rank."""
    return [Sharding(shape, Place.of(layout, rank)) for rank in range(layout.ranks)]


def whole(spec: LoraSpec, seed: int = 0, shape: ModelShape = SHAPE) -> torch.Tensor:
    """Random values of an adapter on the whole model."""
    count = size([each.site for each in model_sites(shape)], spec)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_numbered_as_megatron_does() -> None:
    """Tensor ranks are neighbours, then copies, then stages; each place is taken once."""
    layout = Layout(tensor=2, pipeline=3, data=2)
    places = [Place.of(layout, rank) for rank in range(layout.ranks)]
    found = [(place.tensor, place.data, place.stage) for place in places[:5]]
    assert found == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)]
    assert len({place[1:] for place in places}) == 12
    assert [list(place.layers(6)) for place in places[::4]] == [[0, 1], [2, 3], [4, 5]]
    assert sum(place.speaks for place in places) == 2


@pytest.mark.parametrize(("shape", "layout"), CUTS, ids=CUT_IDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"seed {spec.seed}")
def test_parts_put_together_are_the_whole(shape: ModelShape, layout: Layout, spec: LoraSpec) -> None:
    """Those that are first of what there are copies of."""
    values = whole(spec, shape=shape)
    again = torch.full_like(values, torch.nan)
    for sharding in shardings(layout, shape):
        if not (sharding.place.is_original or sharding.place.has_original_experts):
            continue
        sharding.put(sharding.share_of(values, spec, CPU), again, spec)
    assert torch.equal(again, values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fresh_parts_put_together_are_the_shared_initial_numbers(layout: Layout) -> None:
    spec = SPECS[0]
    found = torch.full_like(whole(spec), torch.nan)
    for sharding in shardings(layout):
        sharding.put(sharding.initial(spec, CPU).values, found, spec)
    adapter = Adapter([each.site for each in model_sites(SHAPE)], spec, found)
    for site, factors in zip(adapter.sites, adapter.factors, strict=True):
        assert factors is not None
        assert np.array_equal(factors.a.numpy(), initial_a(5, site.name, 3, site.in_features))
        assert not factors.b.any()


@pytest.mark.parametrize(("shape", "layout"), CUTS, ids=CUT_IDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"seed {spec.seed}")
def test_squares_add_up_to_the_whole_norm(shape: ModelShape, layout: Layout, spec: LoraSpec) -> None:
    """Of all ranks: what several of them have counts once."""
    values = whole(spec, 1, shape)
    total = 0.0
    for sharding in shardings(layout, shape):
        adapter = Adapter(sharding.sites, spec, sharding.share_of(values, spec, CPU))
        gradient = Gradient(adapter)
        gradient.values.copy_(adapter.values)
        total += sharding.square(gradient)
    assert total == pytest.approx(float(values.double().square().sum()), rel=1e-12)


def test_a_square_that_is_not_finite_says_so() -> None:
    [sharding] = shardings(Layout())
    gradient = Gradient(sharding.initial(SPECS[0], CPU))
    gradient.values[7] = torch.inf
    assert sharding.square(gradient) == np.inf


def test_sites_are_the_layers_of_transformers() -> None:
    """Against the modules of Transformers' own model of this shape."""
    config = Qwen3Config(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    model = Qwen3ForCausalLM(config)
    expected = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert {each.site.name: each.site[1:] for each in model_sites(SHAPE)} == expected


def forward(lengths: list[int]) -> Forward:
    """An operation with data of these lengths."""
    return Forward([Datum(Tensor.of(np.zeros(length, np.int32)), {}) for length in lengths], "cross_entropy")


def test_data_fall_to_the_same_ranks_whatever_runs_beside() -> None:
    """Where operations are not computed together."""
    operations = [forward([9, 1]), forward([3, 4])]
    alone = [share[0] for share in share_out(operations[1:], 2, together=False)]
    assert [share[1] for share in share_out(operations, 2, together=False)] == alone
    assert [share[1] for share in share_out(operations, 2)] != alone


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_datum_is_computed_once_and_tokens_are_spread(ranks: int) -> None:
    operations = [forward([9, 1, 5, 5, 2]), forward([8]), forward([3, 3, 3, 4])]
    shares = share_out(operations, ranks)
    for number, operation in enumerate(operations):
        dealt = [member for share in shares for member in share[number]]
        assert sorted(dealt) == list(range(len(operation.data)))
    loads = [
        sum(operations[i].data[member].tokens.shape[0] for i, own in enumerate(share) for member in own)
        for share in shares
    ]
    assert max(loads) - min(loads) <= 9
    assert shares == share_out([msgspec.structs.replace(operation) for operation in operations], ranks)
