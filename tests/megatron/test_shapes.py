"""A config.json is read as Transformers reads it, and what would be computed otherwise is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.interface import LoadError
from engines.megatron.shapes import FAMILIES, MAX_CONFIG_BYTES, Llama3Rope, parse_shape, read_shape
from tests.megatron.shapes import LLAMA3, encoded, tiny_config

TINY = Path(__file__).parents[2] / "engines" / "tiny" / "model"


def test_the_built_in_model_has_a_shape() -> None:
    shape = read_shape(TINY)
    assert (shape.family, shape.layers, shape.hidden, shape.ffn) == ("qwen3", 4, 160, 448)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, 2, 32)
    assert (shape.query_width, shape.kv_width) == (128, 64)
    assert shape.tied
    assert shape.qk_norm
    assert shape.rope_scaling is None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(family: str, tmp_path: Path) -> None:
    """Transformers renames fields when it writes a configuration; both spellings mean the same."""
    from transformers import AutoConfig

    given = tiny_config(family)
    AutoConfig.for_model(**given).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() != encoded(family)
    assert read_shape(tmp_path) == parse_shape(encoded(family))


def test_experts_are_read_where_there_are_some() -> None:
    moe = parse_shape(encoded("qwen3_moe"))
    assert (moe.experts, moe.experts_per_token, moe.ffn, moe.normalize_expert_weights) == (8, 2, 32, True)
    dense = parse_shape(encoded("qwen3", num_experts=8))
    assert (dense.experts, dense.ffn) == (0, 96)


def test_older_configurations_have_positions_in_other_fields() -> None:
    older = tiny_config("llama", rope_theta=500_000.0, rope_scaling=LLAMA3)
    del older["rope_parameters"]
    shape = parse_shape(json.dumps(older).encode())
    assert shape == parse_shape(encoded("llama"))
    assert shape.rope_theta == 500_000.0
    assert shape.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(family: str) -> None:
    """Llama 2 says nothing of its positions, for one."""
    from transformers import AutoConfig

    given = tiny_config(family, hidden_size=256, num_attention_heads=32)
    for name in (
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_parameters",
        "norm_topk_prob",
    ):
        given.pop(name, None)
    theirs = AutoConfig.for_model(**given)
    shape = parse_shape(json.dumps(given).encode())
    assert shape.kv_heads == theirs.num_key_value_heads
    assert shape.head_dim == getattr(theirs, "head_dim", 256 // 32)
    assert shape.tied == theirs.tie_word_embeddings
    assert {"rope_theta": shape.rope_theta, "rope_type": "default"} == theirs.rope_parameters
    assert shape.normalize_expert_weights == getattr(theirs, "norm_topk_prob", False)


def test_heads_are_as_wide_as_the_model_allows_when_nothing_is_said() -> None:
    shape = parse_shape(encoded("llama", head_dim=None, num_key_value_heads=None))
    assert (shape.head_dim, shape.kv_heads) == (16, 4)
    assert not shape.qk_norm


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3", {}, "model_type is 'gemma3'; the megatron engine has qwen3, llama, qwen3_moe"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*takes 'silu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"num_experts": None}, "would have 0 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
        ("qwen3", {"num_key_value_heads": 3}, r"num_attention_heads is 4, which num_key_value_heads \(3\)"),
        ("qwen3", {"num_hidden_layers": 0}, "would have 0 layers"),
        ("qwen3", {"num_key_value_heads": 0}, "would have 0 kv_heads"),
        ("qwen3", {"hidden_size": "wide"}, ": hidden_size: Expected `int`, got `str`"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters.factor: Obj"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0; it must be a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse_shape(encoded(family, **changes))


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config\.json cannot be read: No such file"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="truncated"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(LoadError, match="more than 1048576 bytes"):
        read_shape(tmp_path)
