"""One rank on a CUDA device gives the numbers of the engine on Transformers there, in float32 and in bfloat16.

    python -m pytest tests/megatron/test_on_cuda.py -m gpu

Without a device all of it is skipped. Nothing here needs more than a few hundred MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from engines.contract.material import Array, Caller, distance, supervised, text, weights
from engines.hf import HfEngine
from engines.operations import Datum
from tests.hf.conftest import EXPERTS, SHAPE, write_tokenizer
from tests.megatron.conftest import configuration, running

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("default"),  # libraries may warn of a device's ways
]

STEPS = 3
# Heads of 64 and sizes that 8 divides: what CUDA's kernels for 16 bits take.
WIDE = SHAPE | {"hidden_size": 64, "head_dim": 64, "intermediate_size": 128}
KINDS = {"dense": Qwen3Config, "experts": Qwen3MoeConfig}


class Bounds(NamedTuple):
    """Of relative differences from Transformers: in log-probs and losses, and in the factors B, zero before."""

    logprobs: float
    weights: float


BOUNDS = {"float32": Bounds(1e-4, 1e-4), "bfloat16": Bounds(2e-2, 0.3)}
"""bfloat16 has eight bits, and each layer rounds some of its sums elsewhere than Transformers does. Adam's first steps
go by the gradients' signs, which rounding turns where a gradient is about zero. On the CPU it is 1e-3 and 0.1."""


class Outcome(NamedTuple):
    """What training gave."""

    logprobs: list[Array]
    losses: list[float]
    weights: dict[str, Array]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model."""
    torch.manual_seed(5)
    experts = EXPERTS | {"moe_intermediate_size": 32} if request.param == "experts" else {}
    model = AutoModelForCausalLM.from_config(KINDS[request.param](**WIDE, **experts), dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in key else 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def outcome(caller: Caller, storage: Path) -> Outcome:
    """Of some steps on texts of different lengths, several in a pass, and one longer than a pass."""
    data: list[Datum] = []
    for length in (7, 12, 3, 12, 80):
        tokens = text(caller.info, length + 1, length)
        data.append(supervised(tokens[:-1], tokens[1:]))
    caller.create("run", rank=8, seed=3)
    before = caller.logprobs(data, "run")
    losses = caller.train(data, STEPS, "run", learning_rate=1e-3, grad_clip_norm=5.0, weight_decay=0.1)
    caller.save("checkpoints/run", "run", optimizer_state=True)
    return Outcome(before, losses, weights(storage, "checkpoints/run"))


@pytest.fixture
def transformers_alone() -> Iterator[None]:
    """The device's memory is given back behind a test."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("transformers_alone")
def test_deterministic_mode_gives_the_same_bits_again(folder: str, tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        storage = tmp_path / str(again)
        settings = {"device": "cuda", "dtype": "bfloat16", "deterministic": True}
        with running(folder, storage, **settings) as engine:
            found.append(outcome(Caller(engine), storage).weights)
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.usefixtures("transformers_alone")
@pytest.mark.parametrize("recompute", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_one_rank_trains_with_the_numbers_of_transformers(
    dtype: str, recompute: bool, folder: str, tmp_path: Path
) -> None:
    settings = {"device": "cuda", "dtype": dtype, "pass_tokens": 64}
    hf = HfEngine.load(configuration("hf", folder, tmp_path / "hf", **settings))
    expected = outcome(Caller(hf), tmp_path / "hf")
    hf.close()
    with running(folder, tmp_path / "megatron", recompute=recompute, **settings) as engine:
        assert engine.info().device == "1 x cuda"
        assert engine.info().dtype == dtype
        assert all(weight.is_cuda for weight in engine.rank.stage.module.parameters())
        found = outcome(Caller(engine), tmp_path / "megatron")
    bounds = BOUNDS[dtype]
    assert distance(found.logprobs, expected.logprobs) < bounds.logprobs
    assert found.losses == pytest.approx(expected.losses, rel=bounds.logprobs)
    assert found.losses[-1] < found.losses[0]
    assert found.weights.keys() == expected.weights.keys()
    names = [name for name in expected.weights if "lora_B" in name]
    far = distance([found.weights[name] for name in names], [expected.weights[name] for name in names])
    assert far < bounds.weights
