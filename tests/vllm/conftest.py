"""The real vLLM, where an interpreter that has it is named; one process serves all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.hf.conftest import SHAPE, write_tokenizer
from tests.vllm.paired import VllmProcess


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Qwen3 whose heads are as large as vLLM's attention on the CPU takes them."""
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 32}, tie_word_embeddings=True))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in key else 0.05)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vllm_process(
    vllm_python: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmProcess]:
    with VllmProcess(vllm_python, tmp_path_factory.mktemp("vllm"), model_folder) as process:
        yield process


@pytest.fixture
def storage(vllm_process: VllmProcess, request: pytest.FixtureRequest) -> Path:
    """A folder of the process's storage for each test: what is written under a key there never changes."""
    return vllm_process.new_folder()
