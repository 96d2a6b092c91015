"""Adapters as every engine sees them: which layers they attach to, their initial numbers, and PEFT's file layout.

A run on one engine must begin with the numbers of the same run on any other, and a folder that one engine wrote must
load in every other, in PEFT and in vLLM. What that takes is decided here, without a tensor framework.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.operations import LoraSpec

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
GRADIENT = "gradient.safetensors"
"""Of snapshots alone: the sum of gradients since the last step, where there is one."""
"""Step count and moments, only in checkpoints that training can continue from."""

Part = Literal["attn", "mlp", "unembed"]

ATTENTION_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense"})
MLP_LAYERS = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"})
UNEMBEDDING_LAYERS = frozenset({"lm_head"})
"""Last parts of the names of the linear layers that `train_attn`, `train_mlp` and `train_unembed` mean."""


def part_of(module_name: str) -> Part | None:
    """The part of the model that a linear layer belongs to, by the last part of its name; None if adapters pass it by.

    `model.layers.0.self_attn.q_proj` is "attn", `model.layers.0.mlp.up_proj` "mlp", `lm_head` "unembed".
    """
    last = module_name.rpartition(".")[2]
    if last in ATTENTION_LAYERS:
        return "attn"
    if last in MLP_LAYERS:
        return "mlp"
    return "unembed" if last in UNEMBEDDING_LAYERS else None


def attaches(module_name: str, lora: LoraSpec) -> bool:
    """Whether an adapter of this configuration attaches to the linear layer of this name."""
    part = part_of(module_name)
    chosen = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    return part is not None and chosen[part]


def initial_a(seed: int, module_name: str, rank: int, in_features: int) -> NDArray[np.float32]:
    """A of a fresh adapter: float32 [rank, in_features], uniform in ±1/sqrt(in_features). B is zero.

    The numbers are a function of the seed and the layer's Hugging Face name (`model.layers.0.mlp.up_proj`), the same on
    every platform: Philox-4x64 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the
    first 128 bits, little-endian, of the SHA-256 of `"<seed>/<name>"`, one raw 64-bit draw for each number, row after
    row. The upper 24 bits k of a draw become (2k + 1) / 2^24 - 1, which float32 holds exactly, so that only the
    product with the bound is rounded.
    """
    digest = hashlib.sha256(f"{seed}/{module_name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    top = (generator.random_raw(rank * in_features) >> np.uint64(40)).astype(np.int32)
    unit = (2 * top + 1 - 2**24).astype(np.float32) * np.float32(2.0**-24)
    numbers: NDArray[np.float32] = unit * np.float32(1.0 / math.sqrt(in_features))
    return numbers.reshape(rank, in_features)


def peft_key(module_name: str, factor: Literal["A", "B"]) -> str:
    """PEFT's name of one factor of a layer in `adapter_model.safetensors`; A is [rank, in], B [out, rank]."""
    return f"base_model.model.{module_name}.lora_{factor}.weight"


def peft_config(lora: LoraSpec, base_model: str, module_names: Iterable[str]) -> bytes:
    """The contents of `adapter_config.json` for an adapter that attaches to the layers named.

    PEFT and vLLM take a layer as a target when its name ends with one of `target_modules`; the last parts of the names
    are therefore enough. Both read `lora_alpha` as a whole number, so it is written as one where it is one.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in module_names}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(config, indent=2) + "\n").encode()
