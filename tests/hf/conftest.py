"""Small random models in folders of their own, and engines on them (CPU, float32, one thread)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from engines.hf import HfEngine
from engines.interface import EngineConfig

MakeEngine = Callable[..., HfEngine]

SHAPE: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
}

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
KINDS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "moe": partial(Qwen3MoeConfig, **EXPERTS),
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`tied` and `untied` are Qwen3 models, `llama` has another architecture, `moe` has experts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for name, tied in (("tied", True), ("untied", False), ("llama", False), ("moe", False)):
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(
            KINDS.get(name, Qwen3Config)(**SHAPE, tie_word_embeddings=tied)
        )
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in key else 0.05)
        folder = root / name
        model.save_pretrained(folder)
        write_tokenizer(folder)
        folders[name] = str(folder)
    return folders


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token; two special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<begin>"}'
    (folder / "tokenizer_config.json").write_text(settings)


@pytest.fixture
def make_engine(model_folders: dict[str, str], tmp_path: Path) -> MakeEngine:
    """An engine on one of the models; keywords are its limits, and its options."""

    def make(
        model: str = "tied",
        run_memory_bytes: int | None = None,
        adapter_memory_bytes: int | None = None,
        **options: Any,
    ) -> HfEngine:
        config = EngineConfig(
            name=model,
            plugin="hf",
            base_model=f"test/{model}",
            model=model_folders.get(model, model),
            roles=("train", "sample"),
            storage=str(tmp_path / "storage"),
            epoch=1,
            options={"threads": 1, "device": "cpu", **options},
            run_memory_bytes=run_memory_bytes,
            adapter_memory_bytes=adapter_memory_bytes,
        )
        return HfEngine.load(config)

    return make


@pytest.fixture
def engine(make_engine: MakeEngine) -> HfEngine:
    return make_engine()
