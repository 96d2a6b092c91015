"""Models of shapes that the other tests' models do not have: the numbers of Transformers all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engines.contract.material import Caller, distance
from engines.hf import HfEngine
from tests.hf.conftest import write_tokenizer
from tests.megatron.conftest import configuration, running
from tests.megatron.shapes import tiny_config
from tests.megatron.test_layouts import caller_logprobs, trained

SHAPES: dict[str, dict[str, Any]] = {
    # One key and value head for six queries, heads wider than hidden / heads, a vocabulary that nothing divides.
    "one pair of keys": {"family": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 24,
                         "vocab_size": 521, "num_hidden_layers": 3, "tie_word_embeddings": True},
    # As many keys as queries, heads narrower than that, epsilon that counts.
    "narrow heads": {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
                     "vocab_size": 347, "intermediate_size": 75, "rms_norm_eps": 0.05},
    "tied llama": {"family": "llama", "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2,
                   "head_dim": 12, "vocab_size": 350, "tie_word_embeddings": True},
    # Weights of experts that do not sum to one; three of five, and wider than the hidden states.
    "experts as they are": {"family": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 8,
                            "norm_topk_prob": False, "moe_intermediate_size": 72, "vocab_size": 333},
    "every expert": {"family": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
                     "tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model of the shape."""
    torch.manual_seed(7)
    config = tiny_config(**SHAPES[request.param], eos_token_id=257)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    made = tmp_path_factory.mktemp("odd")
    model.save_pretrained(made)
    write_tokenizer(made)
    return str(made)


def agrees(folder: str, storage: Path, **options: Any) -> None:
    """Logits, losses and weights of an engine are those of Transformers."""
    hf = HfEngine.load(configuration("hf", folder, storage))
    expected, theirs = trained(Caller(hf), "checkpoints/hf", storage)
    with running(folder, storage, pass_tokens=24, **options) as engine:
        caller = Caller(engine)
        assert distance(caller_logprobs(caller), caller_logprobs(Caller(hf))) < 1e-5
        losses, ours = trained(caller, "checkpoints/megatron", storage)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert distance([ours[name]], [values]) < 1e-4, name


def test_one_rank_agrees(folder: str, tmp_path: Path) -> None:
    agrees(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["one pair of keys", "experts as they are"], indirect=True)
def test_ranks_that_share_sequences_agree(folder: str, tmp_path: Path) -> None:
    """Of a model that tensor ranks could not divide."""
    agrees(folder, tmp_path, context=2, recompute=True)


def test_a_tied_table_lies_in_memory_once(model_folder: str, tmp_path: Path) -> None:
    with running(model_folder, tmp_path) as engine:
        stage = engine.rank.stage
        assert stage.unembedding is not None
        assert stage.unembedding.weight is stage.module.embedding.word_embeddings.weight
