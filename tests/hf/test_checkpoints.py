"""Saving and loading: training goes on bit for bit, and PEFT itself reads what was saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from engines.hf import HfEngine
from engines.interface import RunOperation, UserError
from engines.operations import (
    LoadWeights,
    LoadWeightsResult,
    LoraSpec,
    SaveWeights,
    SaveWeightsResult,
)
from engines.storage import CHECKSUMS, FolderStorage
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    TIED,
    create,
    forward,
    forward_backward,
    logprobs,
    numbers,
    own_logprobs,
    plain_model,
    step,
    supervised,
    train,
)

SPEC = LoraSpec(rank=4, seed=11)


def save(engine: HfEngine, folder: str, optimizer_state: bool = True, run_id: str = "run") -> int:
    outcome = engine.save_weights([RunOperation(run_id, SaveWeights(folder, optimizer_state))])[0]
    assert isinstance(outcome, SaveWeightsResult), outcome
    return outcome.size_bytes


def load(
    engine: HfEngine, folder: str, optimizer_state: bool = True, run_id: str = "run"
) -> UserError | None:
    outcome = engine.load_weights([RunOperation(run_id, LoadWeights(folder, optimizer_state))])[0]
    assert isinstance(outcome, (LoadWeightsResult, UserError))
    return outcome if isinstance(outcome, UserError) else None


def steps(engine: HfEngine, numbers: range, run_id: str = "run") -> list[float]:
    """Training steps that depend on their number only; the losses."""
    losses = []
    for number in numbers:
        losses.append(forward_backward(engine, supervised([9, 5], number), run_id=run_id).metrics["loss:sum"])
        step(engine, run_id, learning_rate=1e-2, weight_decay=0.1)
    return losses


@pytest.mark.parametrize("way", ["load", "create", "other engine"])
def test_going_on_equals_never_having_stopped(make_engine: MakeEngine, way: str) -> None:
    """Saved after 3 of 7 steps, trained elsewhere, loaded: losses, weights and moments are bit-identical."""
    engine = make_engine()
    create(engine, spec=SPEC)
    steps(engine, range(3))
    save(engine, "state/three")
    expected = steps(engine, range(3, 7))
    whole = engine.runs["run"]
    other = make_engine() if way == "other engine" else engine
    if way == "load":
        create(other, "again", LoraSpec(rank=4, seed=99))
        steps(other, range(50, 52), "again")
        forward_backward(other, supervised([6]), run_id="again")
        assert load(other, "state/three", run_id="again") is None
    else:
        create(other, "again", SPEC, folder="state/three", optimizer_state=True)
    assert steps(other, range(3, 7), "again") == expected
    again = other.runs["again"]
    assert again.optimizer.steps == whole.optimizer.steps == 7
    assert torch.equal(again.adapter.values, whole.adapter.values)
    for one, two in (
        (again.optimizer.exp_avg, whole.optimizer.exp_avg),
        (again.optimizer.exp_avg_sq, whole.optimizer.exp_avg_sq),
    ):
        assert one is not None and two is not None and torch.equal(one, two)


def test_without_optimizer_state_the_optimizer_starts_afresh(engine: HfEngine) -> None:
    create(engine, spec=SPEC)
    steps(engine, range(3))
    values = engine.runs["run"].adapter.values.clone()
    save(engine, "state/three")
    assert load(engine, "state/three", optimizer_state=False) is None
    run = engine.runs["run"]
    assert torch.equal(run.adapter.values, values)
    assert run.optimizer.steps == 0 and run.optimizer.exp_avg is None and run.pending is None


def test_saving_between_backward_and_step_loses_nothing(engine: HfEngine) -> None:
    for run_id in ("run", "other"):
        create(engine, run_id, SPEC)
        forward_backward(engine, supervised([9, 5]), run_id=run_id)
    save(engine, "state/pending")
    for run_id in ("run", "other"):
        step(engine, run_id, learning_rate=1e-2)
    assert torch.equal(engine.runs["run"].adapter.values, engine.runs["other"].adapter.values)


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("unembed", [True, False])
def test_peft_reads_what_was_saved(
    make_engine: MakeEngine, model_folders: dict[str, str], tmp_path: Path, model: str, unembed: bool
) -> None:
    engine = make_engine(model)
    create(engine, spec=LoraSpec(rank=4, seed=2, alpha=8.0, train_unembed=unembed))
    train(engine, supervised([20, 15]), 4, rate=2e-2)
    size = save(engine, "adapters/one", optimizer_state=False)
    folder = tmp_path / "storage" / "adapters" / "one"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        CHECKSUMS,
    ]
    assert size == FolderStorage.size(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in stored)
    assert any("lm_head" in name for name in stored) == unembed

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        reference = PeftModel.from_pretrained(plain_model(model_folders[model]), str(folder)).eval()
    data = supervised([19, 8], seed=4)
    base = plain_model(model_folders[model])
    for datum, found in zip(data, logprobs(forward(engine, data)), strict=True):
        tokens, targets = numbers(datum.tokens), numbers(datum.loss_inputs["target_tokens"])
        with torch.no_grad():
            expected = own_logprobs(reference, tokens, targets).numpy()
            unadapted = own_logprobs(base, tokens, targets).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert np.abs(expected - unadapted).max() > 1e-2


def test_the_configuration_is_pefts(engine: HfEngine, tmp_path: Path) -> None:
    create(engine, spec=LoraSpec(rank=4, seed=2, alpha=8.0, train_mlp=False))
    save(engine, "adapters/one", optimizer_state=False)
    config = json.loads((tmp_path / "storage/adapters/one/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (LoraSpec(rank=8, seed=1), "rank|shape"),
        (LoraSpec(rank=4, seed=1, train_mlp=False), "train_mlp"),
    ],
)
def test_another_shape_is_refused_and_nothing_changes(engine: HfEngine, spec: LoraSpec, match: str) -> None:
    create(engine, spec=SPEC)
    save(engine, "state/one")
    create(engine, "other", spec)
    before = engine.runs["other"].adapter.values.clone()
    error = load(engine, "state/one", run_id="other")
    assert error is not None
    with pytest.raises(UserError, match=match):
        raise error
    assert torch.equal(engine.runs["other"].adapter.values, before)


def test_missing_things_are_named(engine: HfEngine) -> None:
    create(engine, spec=SPEC)
    save(engine, "adapters/one", optimizer_state=False)
    error = load(engine, "adapters/one", optimizer_state=True)
    assert error is not None and "optimizer" in str(error)
    error = load(engine, "adapters/none", optimizer_state=False)
    assert error is not None


def test_a_damaged_file_is_a_sentence(engine: HfEngine, tmp_path: Path) -> None:
    create(engine, spec=SPEC)
    save(engine, "state/one")
    path = tmp_path / "storage/state/one/adapter_model.safetensors"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:100])
    error = load(engine, "state/one")
    assert error is not None and "adapter_model.safetensors" in str(error)
