"""The committed model, loaded once as a user loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engines.tiny

FOLDER = Path(engines.tiny.__file__).parent / "model"


@pytest.fixture(scope="session")
def folder() -> Path:
    """The model's folder in the tree."""
    return FOLDER


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer, by `AutoTokenizer`."""
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="session")
def model() -> Any:
    """The model in float32, by `AutoModelForCausalLM`."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
