"""Megatron engines on small random models, with one HF engine beside them that samples and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engines.hf import HfEngine
from engines.interface import EngineConfig
from engines.megatron import MegatronEngine
from tests.hf.conftest import SHAPE, write_tokenizer

Layout = dict[str, int]
MakeMegatron = Callable[..., Any]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Qwen3, cut into stages and shares without a rest."""
    torch.manual_seed(4)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in key else 0.05)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def configuration(plugin: str, model: str, storage: Path, **options: Any) -> EngineConfig:
    """Of an engine that trains, or, with the plugin hf, that samples too."""
    return EngineConfig(
        name=plugin,
        plugin=plugin,
        base_model="test/tiny",
        model=model,
        roles=("train",) if plugin == "megatron" else ("train", "sample"),
        storage=str(storage),
        epoch=1,
        options={"device": "cpu", "threads": 1, **options},
    )


@contextmanager
def running(model: str, storage: Path, **options: Any) -> Iterator[MegatronEngine]:
    """A Megatron engine, whose ranks end with the block. One at a time: a process is in one world."""
    engine = MegatronEngine.load(configuration("megatron", model, storage, **options))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def hf(model_folder: str, tmp_path: Path) -> HfEngine:
    """On the same model and storage."""
    return HfEngine.load(configuration("hf", model_folder, tmp_path))
