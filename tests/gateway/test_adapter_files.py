"""Adapters from outside, checked and written again; what is written is read by the safetensors library itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from engines.interface import EngineInfo, UserError
from gateway.adapter_files import Weights, read_config, rewrite_adapter
from tests.engines.test_checks import INFO

LAYERS = {
    "model.layers.0.self_attn.q_proj": (6, 8),
    "model.layers.0.self_attn.v_proj": (6, 4),
    "model.layers.0.mlp.up_proj": (6, 10),
    "lm_head": (6, 20),
}
BASE = msgspec.structs.replace(INFO, layers=LAYERS, max_rank=16, train_unembed=True)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "target_modules": ["q_proj"], "bias": "none"}
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
V = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"


def factors(name: str = Q, inner: int = 6, outer: int = 8, rank: int = 2) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(3)
    return {
        name.format("A"): random.normal(size=(rank, inner)).astype(np.float32),
        name.format("B"): random.normal(size=(outer, rank)).astype(np.float32),
    }


def adapter(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors if tensors is not None else factors(), folder / "adapter_model.safetensors")
    return folder


def rewritten(source: Path, info: EngineInfo = BASE) -> tuple[Any, dict[str, NDArray[Any]], dict[str, Any]]:
    target = source.parent / "target"
    target.mkdir(exist_ok=True)
    imported = rewrite_adapter(source, target, info)
    weights = load_file(target / "adapter_model.safetensors")
    assert imported.size_bytes == sum(path.stat().st_size for path in target.iterdir())
    return imported, weights, json.loads((target / "adapter_config.json").read_text())


def test_numbers_are_kept_and_the_rest_of_the_part_is_zero(tmp_path: Path) -> None:
    given = factors()
    imported, weights, config = rewritten(adapter(tmp_path / "in", given))
    assert imported.lora.rank == config["r"] == 2
    assert imported.lora.alpha == config["lora_alpha"] == 7
    spec = imported.lora
    assert (spec.train_attn, spec.train_mlp, spec.train_unembed) == (True, False, False)
    assert (imported.layers, imported.zero_layers) == (2, 1)
    assert weights.keys() == {*given, V.format("A"), V.format("B")}
    for name, numbers in given.items():
        np.testing.assert_array_equal(weights[name], numbers)
    assert not weights[V.format("A")].any()
    assert weights[V.format("B")].shape == (4, 2)
    assert not weights[V.format("B")].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32_exactly(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    source = adapter(tmp_path / "in")
    tensors = {name: torch.tensor(values).to(getattr(torch, dtype)) for name, values in factors().items()}
    save_torch(tensors, source / "adapter_model.safetensors")
    _, weights, _ = rewritten(source)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights[name], tensor.float().numpy())


def test_alpha_may_be_a_fraction(tmp_path: Path) -> None:
    imported, _, config = rewritten(adapter(tmp_path / "in", lora_alpha=0.5))
    assert imported.lora.alpha == config["lora_alpha"] == 0.5


def test_what_peft_writes_by_default_is_taken(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=7, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    config.save_pretrained(tmp_path)
    assert read_config((tmp_path / "adapter_config.json").read_bytes()) == (2, 7.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 17}, "at most 16"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 1e999}, "adapter_config.json"),
        ({"bias": "all"}, "bias"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": "x"}, "something_new"),
    ],
)
def test_what_would_be_another_adapter_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        rewritten(adapter(tmp_path / "in", **change))


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_none_is_said(body: bytes) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_config(body)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no tensors"),
        (factors("base_model.model.model.layers.9.self_attn.q_proj.lora_{}.weight"), "layers.9"),
        (factors(inner=7), r"shape \[2, 7\].*\[2, 6\]"),
        (factors(outer=9), r"shape \[9, 2\].*\[8, 2\]"),
        (factors(rank=3), r"\[3, 6\]"),
        ({Q.format("A"): factors()[Q.format("A")]}, "lora_B.weight is missing"),
        ({Q.format("B"): factors()[Q.format("B")]}, "lora_A.weight is missing"),
        (
            {**factors(), "base_model.model.lm_head.base_layer.weight": np.zeros((20, 6), np.float32)},
            "base_layer",
        ),
        ({name: numbers.astype(np.float64) for name, numbers in factors().items()}, "F64"),
        ({name: numbers.astype(np.int32) for name, numbers in factors().items()}, "I32"),
        ({**factors(), Q.format("A"): np.full((2, 6), np.nan, np.float32)}, "not finite"),
        ({**factors(), Q.format("B"): np.full((8, 2), np.inf, np.float32)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_the_base_model_are_refused(
    tmp_path: Path, tensors: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        rewritten(adapter(tmp_path / "in", tensors))


def test_an_engine_without_the_unembedding_takes_no_adapter_on_it(tmp_path: Path) -> None:
    source = adapter(tmp_path / "in", factors("base_model.model.lm_head.lora_{}.weight", 6, 20))
    assert rewritten(source)[0].lora.train_unembed
    with pytest.raises(UserError, match="unembedding"):
        rewritten(source, msgspec.structs.replace(BASE, train_unembed=False))


def safetensors_of(header: Any, data: bytes) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def place(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape if shape is not None else [(end - begin) // 4],
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x80\x04.",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        safetensors_of(b"[]", b""),
        safetensors_of(b"\xff\xff", b""),
        safetensors_of({"a": 5}, b""),
        safetensors_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        safetensors_of({"a": place(0, 8)}, bytes(4)),
        safetensors_of({"a": place(0, 4)}, bytes(8)),
        safetensors_of({"a": place(4, 8)}, bytes(8)),
        safetensors_of({"a": place(0, 8), "b": place(4, 8)}, bytes(8)),
        safetensors_of({"a": place(0, 8, [3])}, bytes(8)),
        safetensors_of({"a": place(0, 8, [-2, -1])}, bytes(8)),
        safetensors_of({"a": place(8, 0)}, bytes(8)),
        safetensors_of({"a": place(0, 4, [1 << 62, 1 << 62])}, bytes(4)),
        safetensors_of({"a": place(0, 8, dtype="F8_E4M3")}, bytes(8)),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, file: bytes) -> None:
    """Nothing is read beyond the file, nothing is allocated that it only claims to hold."""
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(file)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        Weights.open(path)


def test_the_library_and_this_reader_agree(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    given: dict[str, NDArray[Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((4,), np.float16),
        "c": np.zeros((0, 2), np.float32),
    }
    save_file(given, path, {"format": "pt"})
    weights = Weights.open(path)
    assert {name: weights.shape(name) for name in weights.tensors} == {n: v.shape for n, v in given.items()}
    for name, numbers in given.items():
        np.testing.assert_array_equal(weights.read(name), numbers)
