"""Initial numbers against Philox written out by hand; the layout against PEFT's own reader."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig

from engines.adapters import attaches, initial_a, part_of, peft_config, peft_key
from engines.operations import LoraSpec

NAME = "model.layers.0.self_attn.q_proj"
WORD = 2**64 - 1


def philox(key: int) -> Iterator[int]:
    """Philox-4x64 with ten rounds, as published; the counter's first block is 1."""
    counter = 0
    while True:
        counter += 1
        x = [counter & WORD, counter >> 64 & WORD, 0, 0]
        k0, k1 = key & WORD, key >> 64
        for _ in range(10):
            low, high = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [(high >> 64) ^ x[1] ^ k0, high & WORD, (low >> 64) ^ x[3] ^ k1, low & WORD]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
        yield from x


@pytest.mark.parametrize(("seed", "rank", "width"), [(0, 1, 1), (7, 3, 5), (-1, 2, 64), (2**64 - 1, 4, 9)])
def test_initial_numbers_are_those_of_the_published_generator(seed: int, rank: int, width: int) -> None:
    digest = hashlib.sha256(f"{seed}/{NAME}".encode()).digest()
    draws = islice(philox(int.from_bytes(digest[:16], "little")), rank * width)
    exact = [((2 * (draw >> 40) + 1) / 2**24 - 1) / math.sqrt(width) for draw in draws]
    found = initial_a(seed, NAME, rank, width)
    assert found.dtype == np.float32
    assert found.shape == (rank, width)
    np.testing.assert_allclose(found.ravel().astype(np.float64), exact, rtol=2e-7)


def test_initial_numbers_never_change() -> None:
    """Replaying an old log gives old weights only as long as this holds, bit by bit."""
    digest = hashlib.sha256(initial_a(42, NAME, 8, 96).astype("<f4").tobytes()).hexdigest()
    assert digest == "a9b828f50c04649316adad73b2ed280e53edbeb5f4adba29f23f266bfdd5fb7a"


def test_initial_numbers_are_spread_evenly_between_the_bounds() -> None:
    numbers = initial_a(1, NAME, 32, 1024).astype(np.float64) * math.sqrt(1024)
    assert np.abs(numbers).max() <= 1
    assert numbers.mean() == pytest.approx(0, abs=0.02)
    assert (numbers**2).mean() == pytest.approx(1 / 3, rel=0.02)
    counts, _ = np.histogram(numbers, bins=16, range=(-1, 1))
    assert counts.min() > 0.9 * numbers.size / 16


def test_seeds_and_layers_have_numbers_of_their_own() -> None:
    one = initial_a(1, NAME, 4, 64)
    others = [initial_a(2, NAME, 4, 64), initial_a(1, NAME.replace("q_", "k_"), 4, 64)]
    assert np.array_equal(one, initial_a(1, NAME, 4, 64))
    for other in others:
        assert not np.isin(one, other).all()
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.q_proj", "attn"),
        ("model.layers.3.self_attn.o_proj", "attn"),
        ("model.layers.3.self_attn.qkv_proj", "attn"),
        ("model.layers.3.mlp.gate_up_proj", "mlp"),
        ("model.layers.3.mlp.down_proj", "mlp"),
        ("transformer.fc1", "mlp"),
        ("lm_head", "unembed"),
        ("model.embed_tokens", None),
        ("model.layers.3.mlp.gate", None),
        ("q_proj.norm", None),
    ],
)
def test_a_layer_belongs_to_a_part_by_its_name(name: str, part: str | None) -> None:
    assert part_of(name) == part


def test_an_adapter_attaches_to_the_parts_that_are_trained() -> None:
    names = {"attn": "a.v_proj", "mlp": "a.up_proj", "unembed": "lm_head", None: "a.norm"}
    spec = LoraSpec(rank=2, seed=0, train_attn=False, train_mlp=False, train_unembed=False)
    assert not any(attaches(name, spec) for name in names.values())
    only_mlp = LoraSpec(rank=2, seed=0, train_attn=False, train_unembed=False)
    assert [part for part, name in names.items() if attaches(name, only_mlp)] == ["mlp"]
    everything = LoraSpec(rank=2, seed=0)
    assert [part for part, name in names.items() if attaches(name, everything)] == ["attn", "mlp", "unembed"]


def test_peft_reads_the_configuration(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{layer}" for i in range(2) for layer in ("mlp.up_proj", "self_attn.q_proj")]
    written = peft_config(LoraSpec(rank=16, seed=3), "some/model", [*names, "lm_head"])
    (tmp_path / "adapter_config.json").write_bytes(written)
    read = LoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, LoraConfig)
    assert (read.r, read.lora_alpha, read.lora_dropout, read.bias) == (16, 32, 0.0, "none")
    assert read.target_modules == {"up_proj", "q_proj", "lm_head"}
    assert read.base_model_name_or_path == "some/model"
    assert (read.use_rslora, read.use_dora, read.modules_to_save) == (False, False, None)


@pytest.mark.parametrize(("alpha", "written"), [(32.0, "32"), (0.5, "0.5")])
def test_alpha_is_written_as_a_whole_number_where_it_is_one(alpha: float, written: str) -> None:
    config = json.loads(peft_config(LoraSpec(rank=4, seed=0, alpha=alpha), "m", ["a.q_proj"]))
    assert json.dumps(config["lora_alpha"]) == written


def test_factors_are_named_as_peft_names_them() -> None:
    assert peft_key("model.layers.0.mlp.up_proj", "A") == (
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    )
    assert peft_key("lm_head", "B") == "base_model.model.lm_head.lora_B.weight"
