"""What keeps a Megatron engine from being loaded is a sentence that says what to change."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.interface import LoadError
from engines.megatron import MegatronEngine
from engines.registry import engine_class
from tests.megatron.conftest import configuration


def refused(model: str, storage: Path, roles: tuple[str, ...] = ("train",), **options: Any) -> str:
    """Why an engine cannot be loaded."""
    config = msgspec.structs.replace(configuration("megatron", model, storage, **options), roles=roles)
    with pytest.raises(LoadError) as error:
        MegatronEngine.load(config)
    return str(error.value)


def test_without_megatron_core_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("engines.megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(LoadError, match=r"pip install 'tandem-gateway\[megatron\]'"):
        engine_class("megatron")


def test_it_does_not_sample(model_folder: str, tmp_path: Path) -> None:
    told = refused(model_folder, tmp_path, roles=("train", "sample"))
    assert 'roles = ["train"]' in told and "hf or vllm" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tensors": 2}, "tensors"),
        ({"tensor": 0}, "options.tensor is 0; it must be at least 1"),
        ({"dtype": "float16"}, "allowed are auto, float32, bfloat16"),
        ({"device": "tpu"}, "allowed are auto, cpu, cuda"),
        ({"rank_timeout_s": 0.1}, "from 1 to 3600"),
        ({"start_timeout_s": 0}, "options.start_timeout_s is 0; it must be from 1 to 86400 seconds"),
        ({"tensor": 4}, "does not divide the model's 2 key and value heads"),
        ({"pipeline": 3}, "does not divide the model's 2 layers"),
        ({"max_context": 10_000}, "the model has 512 positions"),
    ],
)
def test_options_are_refused_by_name(
    model_folder: str, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    assert told in refused(model_folder, tmp_path, **options)


def changed(model: str, folder: Path, **fields: Any) -> str:
    """A copy of a model's folder with another configuration."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"intermediate_size": 64}, "linear_fc1"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_a_model_that_it_has_no_map_for_is_refused(
    model_folder: str, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    assert told in refused(changed(model_folder, tmp_path / "model", **fields), tmp_path)


def test_a_folder_without_weights_is_refused(model_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(str(folder), tmp_path)
    (folder / "model.safetensors").write_bytes(b"no such file")
    assert "safetensors" in refused(str(folder), tmp_path)
