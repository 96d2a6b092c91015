"""The same runs on every layout give the numbers of the engine on Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engines.adapters import OPTIMIZER
from engines.contract.material import Array, Caller, distance, logprobs, same, supervised, text, weights
from engines.hf import HfEngine
from engines.interface import RunOperation
from engines.operations import Datum, ForwardBackward, ForwardResult, OptimStep
from tests.megatron.conftest import running

pytestmark = pytest.mark.slow

STEPS = 10
LAYOUTS: list[dict[str, int]] = [
    {},
    {"tensor": 2, "sequence": False},
    {"pipeline": 2},
    {"devices": 2},  # which makes two copies of what fits one
    {"tensor": 2, "pipeline": 2, "sequence": False},
    {"tensor": 2, "sequence": True},
    {"context": 2},
    {"pipeline": 2, "recompute": True},
    {"tensor": 2, "context": 2, "sequence": True},
]
IDS = [" ".join(f"{name} {size}" for name, size in layout.items()) or "one rank" for layout in LAYOUTS]


def examples(caller: Caller, seed: int = 0) -> list[Datum]:
    """Texts of different lengths, which do not divide by the number of ranks."""
    texts = [text(caller.info, length + 1, seed * 10 + length) for length in (7, 12, 3, 20, 9)]
    return [supervised(tokens[:-1], tokens[1:]) for tokens in texts]


def trained(caller: Caller, folder: str, storage: Path) -> tuple[list[float], dict[str, Array]]:
    """Losses of some steps with clipping and decay, and the weights and the optimizer's moments after them."""
    caller.create("run", rank=8, seed=3)
    losses = caller.train(
        examples(caller), STEPS, "run", learning_rate=1e-3, grad_clip_norm=5.0, weight_decay=0.1
    )
    caller.save(folder, "run", optimizer_state=True)
    return losses, weights(storage, folder) | load_file(storage / folder / OPTIMIZER)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_training_gives_the_numbers_of_transformers(
    layout: dict[str, int], model_folder: str, tmp_path: Path, hf: HfEngine
) -> None:
    expected, theirs = trained(Caller(hf), "checkpoints/hf", tmp_path)
    with running(model_folder, tmp_path, pass_tokens=16, **layout) as engine:
        caller = Caller(engine)
        assert distance(caller_logprobs(caller), caller_logprobs(Caller(hf))) < 1e-5
        losses, ours = trained(caller, "checkpoints/megatron", tmp_path)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert distance([ours[name]], [values]) < 1e-4, name


def caller_logprobs(caller: Caller) -> list[Array]:
    """Of the whole vocabulary after each token, on a fresh run: every logit, but for a constant in each row."""
    caller.create("fresh")
    info = caller.info
    tokens = text(info, 6)
    every = np.tile(np.arange(info.vocab_size), (len(tokens), 1))
    return caller.logprobs([supervised(tokens, every)], "fresh")


KINDS: dict[str, dict[str, Any]] = {
    "a": {"rank": 4, "seed": 1},
    "b": {"rank": 8, "seed": 2, "train_mlp": False},
    "c": {"rank": 2, "seed": 3, "train_unembed": False},
    "d": {"rank": 4, "seed": 4, "train_attn": False},
}


def beside_and_alone(caller: Caller) -> Iterator[tuple[list[Array], list[Array]]]:
    """Log-probs of runs that train in common calls, and of the same runs in calls of their own, step by step."""
    data = {run_id: examples(caller, seed) for seed, run_id in enumerate(KINDS)}
    for run_id, kind in KINDS.items():
        caller.create(run_id, **kind)
        caller.create(f"{run_id} alone", **kind)
    for _ in range(3):
        passes = [RunOperation(r, ForwardBackward(data[r], "cross_entropy", {})) for r in KINDS]
        together = caller.engine.forward_backward(passes)
        caller.engine.optim_step([RunOperation(r, OptimStep(learning_rate=1e-3)) for r in KINDS])
        for run_id, beside in zip(KINDS, together, strict=True):
            assert isinstance(beside, ForwardResult)
            alone = caller.forward_backward(data[run_id], run_id=f"{run_id} alone")
            caller.step(f"{run_id} alone", learning_rate=1e-3)
            yield logprobs(beside), logprobs(alone)


@pytest.mark.parametrize("layout", LAYOUTS[1:4], ids=IDS[1:4])
def test_four_runs_beside_each_other_are_each_what_they_are_alone(
    layout: dict[str, int], model_folder: str, tmp_path: Path
) -> None:
    """Of different ranks and parts; to the last bit in deterministic mode, else up to rounding."""
    with running(model_folder, tmp_path, deterministic=True, **layout) as engine:
        assert all(same(beside, alone) for beside, alone in beside_and_alone(Caller(engine)))
    with running(model_folder, tmp_path, **layout) as engine:
        assert max(distance(beside, alone) for beside, alone in beside_and_alone(Caller(engine))) < 1e-5


def test_a_run_goes_on_under_another_layout_and_on_transformers(
    model_folder: str, tmp_path: Path, hf: HfEngine
) -> None:
    """Saved with its optimizer on two tensor ranks: the next losses are the same wherever it is loaded."""
    with running(model_folder, tmp_path, tensor=2) as engine:
        caller = Caller(engine)
        data = examples(caller)
        caller.create("run", rank=8, seed=3)
        caller.train(data, 4, "run", learning_rate=1e-3)
        caller.save("checkpoints/half", "run", optimizer_state=True)
        expected = caller.train(data, 4, "run", learning_rate=1e-3)
    start: dict[str, Any] = {"rank": 8, "seed": 9, "folder": "checkpoints/half", "optimizer_state": True}
    found = {}
    for layout in LAYOUTS[0], LAYOUTS[2], LAYOUTS[3]:
        with running(model_folder, tmp_path, **layout) as engine:
            caller = Caller(engine)
            caller.create("run", **start)
            found[str(layout)] = caller.train(data, 4, "run", learning_rate=1e-3)
    caller = Caller(hf)
    caller.create("run", **start)
    found["hf"] = caller.train(data, 4, "run", learning_rate=1e-3)
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
