"""Configurations of tiny models."""

from __future__ import annotations

import json
from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """What a config.json of a tiny model of a family has."""
    config: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    if family == "llama":
        config["rope_parameters"] = LLAMA3
    if family == "qwen3_moe":
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        }
    return config | changes


def encoded(family: str, **changes: Any) -> bytes:
    """The text of a tiny model's config.json."""
    return json.dumps(tiny_config(family, **changes)).encode()
