"""What the cost model counts is what models really have: Transformers' own, cut by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engines.adapters import part_of
from engines.megatron.constraints import Layout
from engines.megatron.cost_table import QWEN3_8B, QWEN3_235B
from engines.megatron.costs import Workload, memory, stage_adapter, stage_memory, stage_weights
from engines.megatron.shapes import FAMILIES, parse_shape
from tests.megatron.shapes import encoded, tiny_config


def built(family: str, tied: bool) -> PreTrainedModel:
    """Transformers' model, without numbers."""
    config = AutoConfig.for_model(**tiny_config(family, tie_word_embeddings=tied))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_holds_the_whole_model(family: str, tied: bool) -> None:
    shape = parse_shape(encoded(family, tie_word_embeddings=tied))
    counted = sum(parameter.numel() for parameter in built(family, tied).parameters())
    assert stage_weights(shape, Layout(), 0) == counted


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_one_rank_holds_the_whole_adapter(family: str) -> None:
    layers = {
        name: layer
        for name, layer in built(family, False).named_modules()
        if isinstance(layer, nn.Linear) and part_of(name)
    }
    counted = sum(5 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert stage_adapter(parse_shape(encoded(family)), Layout(), 0, rank=5) == counted


def test_every_expert_has_factors_of_its_own() -> None:
    shape = parse_shape(encoded("qwen3_moe"))
    dense = stage_adapter(parse_shape(encoded("qwen3", intermediate_size=32)), Layout(), 0, rank=5)
    one_expert = 3 * 5 * (64 + 32)
    assert stage_adapter(shape, Layout(), 0, rank=5) == dense + 2 * 7 * one_expert


def test_pipeline_stages_share_the_layers_and_both_ends_have_their_table() -> None:
    shape = parse_shape(encoded("qwen3"))
    table, layout = 512 * 64, Layout(pipeline=2)
    both = stage_weights(shape, layout, 0) + stage_weights(shape, layout, 1)
    assert both == stage_weights(shape, Layout(), 0)
    tied = parse_shape(encoded("qwen3", tie_word_embeddings=True))
    assert (
        stage_weights(tied, layout, 0) + stage_weights(tied, layout, 1)
        == stage_weights(tied, Layout(), 0) + table
    )


def test_the_fullest_stage_counts() -> None:
    layout, load = Layout(pipeline=2), Workload()
    fullest = max(stage_memory(QWEN3_8B, layout, load, stage).total for stage in (0, 1))
    assert memory(QWEN3_8B, layout, load).total == fullest


@pytest.mark.parametrize(("shape", "billions"), [(QWEN3_8B, 8.19), (QWEN3_235B, 235.09)])
def test_public_models_have_as_many_weights_as_their_cards_say(shape: object, billions: float) -> None:
    assert isinstance(shape, type(QWEN3_8B))
    assert stage_weights(shape, Layout(), 0) / 1e9 == pytest.approx(billions, abs=0.01)


def test_bytes_follow_the_workload() -> None:
    plain = memory(QWEN3_8B, Layout(), Workload())
    assert memory(QWEN3_8B, Layout(), Workload(weight_bytes=4)).weights == 2 * plain.weights
    assert memory(QWEN3_8B, Layout(), Workload(runs=3)).adapters == 3 * plain.adapters
    values = stage_adapter(QWEN3_8B, Layout(), 0, 32)
    assert plain.adapters == 16 * values
    assert memory(QWEN3_8B, Layout(data=2, context=2), Workload()).adapters == 10 * values
    assert memory(QWEN3_8B, Layout(), Workload(tokens=16384)).activations == 2 * plain.activations
    again = memory(QWEN3_8B, Layout(), Workload(recompute=True))
    assert again.activations < plain.activations / 8
    assert (
        plain.activations / 2
        < memory(QWEN3_8B, Layout(context=2), Workload()).activations
        < plain.activations
    )
