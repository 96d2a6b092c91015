"""The cost model is right about real ranks: what each holds, sends and keeps while it trains."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engines.megatron.costs import (
    FLOAT,
    Workload,
    adapter_bytes,
    layer_activation_bytes,
    rank_tokens,
    stage_activations,
    stage_adapter,
    stage_weights,
)
from engines.megatron.options import read_options
from engines.megatron.places import Place
from engines.megatron.shapes import read_shape
from engines.megatron.traffic import stage_traffic
from tests.hf.conftest import write_tokenizer
from tests.megatron.counted import step
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.slow

TOKENS, DATA, RANK = 256, 4, 8
CASES: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"data": 2},
    {"context": 2},
    {"recompute": True},
    {"tensor": 2, "recompute": True},
    {"tensor": 2, "sequence": True, "recompute": True},
    {"pipeline": 2, "recompute": True},
    {"context": 2, "recompute": True},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for layers to outweigh what is kept once."""
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("measured")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("options", CASES, ids=str)
def test_ranks_hold_send_and_keep_what_the_model_says(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Weights, adapters, calls and bytes exactly; what is kept until the way back within 15 %."""
    layout = read_options(options).layout
    shape = read_shape(model)
    recompute = options.get("recompute", False)
    load = Workload(tokens=TOKENS, adapter_rank=RANK, weight_bytes=4, recompute=recompute)
    case = {"options": {**options, "pass_tokens": TOKENS}, "tokens": TOKENS, "data": DATA, "rank": RANK}
    run_ranks(step, layout.ranks, tmp_path, str(tmp_path), str(model), json.dumps(case))
    for rank in range(layout.ranks):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        stage = Place.of(layout, rank).stage
        assert seen["weights"] == stage_weights(shape, layout, stage)
        assert seen["adapter"] == stage_adapter(shape, layout, stage, RANK)
        assert seen["moments"] + 8 * seen["adapter"] == adapter_bytes(shape, layout, stage, RANK)
        moved: Counter[tuple[str, int]] = Counter()
        for each in stage_traffic(shape, layout, load, stage, DATA // layout.data):
            moved[each.kind, 0] += each.calls
            moved[each.kind, 1] += each.size
        assert seen["moved"] == {kind: [moved[kind, 0], moved[kind, 1]] for kind, _ in moved}
        kept = stage_activations(shape, layout, load, stage)
        if recompute:  # the layer that is computed again comes later, on the way back
            kept -= rank_tokens(layout, load) * layer_activation_bytes(shape, layout, load)
        assert seen["kept"] - seen["adapter"] * FLOAT == pytest.approx(kept, rel=0.15)
