"""Twenty steps of the engine against twenty steps of PEFT and torch.optim.AdamW from the same initial adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engines.hf import HfEngine
from engines.operations import Datum, LoraSpec, OptimStep
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    create,
    difference,
    engine_factors,
    factors,
    forward,
    forward_backward,
    logprobs,
    numbers,
    own_logprobs,
    peft_model,
    reinforced,
    step,
    supervised,
)

STEPS = 20
TOLERANCE = 1e-4
SPEC = LoraSpec(rank=4, seed=11)


class Reference:
    """A plain training loop: PEFT, full logits, one sequence at a time, torch's own AdamW and clipping."""

    def __init__(self, folder: str, spec: LoraSpec) -> None:
        self.model = peft_model(folder, spec)
        self.weights = factors(self.model)
        self.optimizer = torch.optim.AdamW(self.weights.values())

    def forward_backward(self, data: Sequence[Datum]) -> float:
        total = 0.0
        for datum in data:
            targets = numbers(datum.loss_inputs["target_tokens"])
            weights = torch.tensor(numbers(datum.loss_inputs["weights"]))
            loss = -(own_logprobs(self.model, numbers(datum.tokens), targets) * weights).sum()
            loss.backward()
            total += loss.item()
        return total

    def step(self, settings: dict[str, float]) -> float:
        full = OptimStep(**settings)
        limit = full.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), limit)
        for group in self.optimizer.param_groups:
            group.update(
                lr=full.learning_rate,
                betas=(full.beta1, full.beta2),
                eps=full.eps,
                weight_decay=full.weight_decay,
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@pytest.mark.parametrize(
    ("model", "spec", "settings", "parts"),
    [
        ("tied", SPEC, {}, 1),
        ("untied", SPEC, {}, 1),
        ("llama", SPEC, {}, 1),
        ("tied", SPEC, {}, 2),
        ("tied", SPEC, {"grad_clip_norm": 1.0}, 1),
        ("tied", SPEC, {"weight_decay": 0.3}, 1),
        (
            "tied",
            SPEC,
            {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "grad_clip_norm": 5.0},
            2,
        ),
        ("untied", LoraSpec(rank=8, seed=3, alpha=16.0, train_unembed=False), {}, 1),
        ("tied", LoraSpec(rank=2, seed=4, train_attn=False, train_mlp=False), {}, 1),
    ],
)
def test_twenty_steps_equal_peft(
    make_engine: MakeEngine,
    model_folders: dict[str, str],
    model: str,
    spec: LoraSpec,
    settings: dict[str, float],
    parts: int,
) -> None:
    """Learning rate changes from step to step; `parts` calls of forward_backward before each step."""
    engine = make_engine(model)
    create(engine, spec=spec)
    reference = Reference(model_folders[model], spec)
    for number in range(STEPS):
        data = supervised([9, 14, 9, 5], seed=number)
        share = len(data) // parts
        found = expected = 0.0
        for part in range(parts):
            some = data[part * share : (part + 1) * share]
            found += forward_backward(engine, some).metrics["loss:sum"]
            expected += reference.forward_backward(some)
        assert found == pytest.approx(expected, rel=TOLERANCE)
        used: dict[str, Any] = {"learning_rate": 1e-3 * (1 + number % 3), **settings}
        norm = step(engine, **used)["unclipped_grad_l2:mean"]
        assert norm == pytest.approx(reference.step(used), rel=TOLERANCE)
    weights = engine_factors(engine)
    assert weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        assert difference(weights[name], weight.detach()) <= TOLERANCE, name


def test_a_fresh_adapter_is_the_base_model(engine: HfEngine, model_folders: dict[str, str]) -> None:
    create(engine)
    model = peft_model(model_folders["tied"], SPEC)
    data = supervised([12, 7])
    for datum, found in zip(data, logprobs(forward(engine, data)), strict=True):
        with model.disable_adapter(), torch.no_grad():
            expected = own_logprobs(model, numbers(datum.tokens), numbers(datum.loss_inputs["target_tokens"]))
        np.testing.assert_allclose(
            found, expected.numpy(), rtol=0, atol=1e-6 + 1e-6 * float(expected.abs().max())
        )


def test_the_seed_decides_the_adapter(engine: HfEngine) -> None:
    for run_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        create(engine, run_id, LoraSpec(rank=4, seed=seed))
    same, other, third = (engine.runs[run_id].adapter.values for run_id in "abc")
    assert torch.equal(same, other) and not torch.equal(same, third)


def formula(
    loss: str, p: torch.Tensor, inputs: dict[str, torch.Tensor], config: dict[str, float]
) -> torch.Tensor:
    """The losses as documented, written out once more."""
    q, advantages = inputs["logprobs"], inputs["advantages"]
    ratio = (p - q).exp()
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    bounded = ratio.clamp(low, high)
    if loss == "importance_sampling":
        return -(ratio * advantages).sum()
    if loss == "ppo":
        return -torch.min(ratio * advantages, bounded * advantages).sum()
    if loss == "cispo":
        return -(bounded.detach() * p * advantages).sum()
    return -(p * advantages - 0.5 * config["beta"] * (p - q) ** 2).sum()


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}),
        ("cispo", {}),
        ("cispo", {"clip_high_threshold": 3.0}),
        ("dro", {"beta": 0.05}),
    ],
)
def test_each_loss_and_its_gradient(
    engine: HfEngine, model_folders: dict[str, str], loss: str, config: dict[str, float]
) -> None:
    create(engine)
    reference = Reference(model_folders["tied"], SPEC)
    warm_up(engine, reference)
    data = reinforced(engine, [13, 8, 8])
    result = forward_backward(engine, data, loss, config={**config})
    total = 0.0
    for datum, found in zip(data, logprobs(result), strict=True):
        inputs = {name: torch.tensor(numbers(tensor)) for name, tensor in datum.loss_inputs.items()}
        p = own_logprobs(reference.model, numbers(datum.tokens), numbers(datum.loss_inputs["target_tokens"]))
        np.testing.assert_allclose(found, p.detach().numpy(), rtol=0, atol=1e-4)
        value = formula(loss, p, inputs, config)
        value.backward()
        total += value.item()
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=TOLERANCE, abs=1e-4)
    check_pending(engine, reference)


def test_several_targets_at_a_position(engine: HfEngine, model_folders: dict[str, str]) -> None:
    """Targets and weights [T, K], K different for each datum."""
    create(engine)
    reference = Reference(model_folders["tied"], SPEC)
    warm_up(engine, reference)
    data = several_targets()
    result = forward_backward(engine, data)
    assert [found.shape for found in logprobs(result)] == [(7, 3), (5, 1), (7,), (6, 5)]
    total = reference.forward_backward(data)
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=TOLERANCE)
    check_pending(engine, reference)


def several_targets() -> list[Datum]:
    rng = np.random.default_rng(0)
    data: list[Datum] = []
    for plain, shape in zip(supervised([7, 5, 7, 6]), [(7, 3), (5, 1), (7,), (6, 5)], strict=True):
        inputs: dict[str, Any] = {
            "target_tokens": type(plain.tokens).of(rng.integers(0, 256, shape)),
            "weights": type(plain.tokens).of(rng.normal(0, 1, shape).astype(np.float32)),
        }
        data.append(Datum(plain.tokens, inputs))
    return data


def warm_up(engine: HfEngine, reference: Reference) -> None:
    """Three steps on both sides, so that no factor is zero."""
    for number in range(3):
        data = supervised([10, 6], seed=50 + number)
        forward_backward(engine, data)
        reference.forward_backward(data)
        step(engine, learning_rate=1e-2)
        reference.step({"learning_rate": 1e-2})


def check_pending(engine: HfEngine, reference: Reference) -> None:
    """The run's pending gradient is the reference's."""
    run = engine.runs["run"]
    assert run.pending is not None
    start = 0
    for site, pair in zip(run.adapter.sites, run.adapter.factors, strict=True):
        assert pair is not None
        for name, factor in zip(("lora_A", "lora_B"), pair, strict=True):
            found = run.pending.values[start : start + factor.numel()].view(factor.shape)
            expected = reference.weights[f"{site.name}.{name}"].grad
            assert expected is not None
            assert difference(found, expected) <= TOLERANCE, (site.name, name)
            start += factor.numel()
    assert start == run.pending.values.numel()


def test_every_pass_of_a_call_is_counted_while_it_is_made(make_engine: MakeEngine) -> None:
    engine = make_engine(pass_tokens=12)
    create(engine)
    before = engine.passes
    forward_backward(engine, supervised([10] * 5))
    assert engine.passes == before + 5
