"""The table of losses against what clients of the Tinker API send, and the formulas in torch against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.losses import LOSSES
from engines.losses.formulas import FORMULAS

Array = NDArray[np.float64]

POLICY = ["target_tokens", "logprobs", "advantages"]


def material(seed: int = 0, shape: tuple[int, ...] = (200,)) -> tuple[Array, Array, Array]:
    """p, q and A; ratios from about 0.4 to 2.7, beyond the bounds on both sides."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(-6, -0.1, shape)
    return p, p + rng.uniform(-1, 1, shape), rng.normal(0, 1, shape)


def in_torch(name: str, p: Array, config: dict[str, float], **inputs: Array) -> tuple[Array, Array]:
    """The loss of each token and its derivative by p, from the formula in float64."""
    variable = torch.tensor(p, requires_grad=True)
    given = {key: torch.tensor(value) for key, value in inputs.items()}
    loss = FORMULAS[name](variable, given, LOSSES[name].with_defaults(config))
    loss.sum().backward()
    assert variable.grad is not None
    return loss.detach().numpy(), variable.grad.numpy()


def test_the_table_holds_what_clients_send() -> None:
    assert {name: list(spec.inputs) for name, spec in LOSSES.items()} == {
        "cross_entropy": ["target_tokens", "weights"],
        "importance_sampling": POLICY,
        "ppo": POLICY,
        "cispo": POLICY,
        "dro": POLICY,
        "gspo": [*POLICY, "sequence_ratio_mask"],
    }
    assert [name for name, spec in LOSSES.items() if spec.many_targets] == ["cross_entropy"]
    assert [name for name, spec in LOSSES.items() if spec.per_sequence] == ["gspo"]
    bounds = ("clip_low_threshold", "clip_high_threshold")
    assert {name: spec.per_token for name, spec in LOSSES.items() if spec.per_token} == {
        "ppo": bounds,
        "cispo": bounds,
        "gspo": bounds,
    }
    assert all(name == spec.name for name, spec in LOSSES.items())


def test_every_loss_of_the_table_has_its_formula() -> None:
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize(
    ("name", "given", "complete"),
    [
        ("cross_entropy", {}, {}),
        ("importance_sampling", {}, {}),
        ("ppo", {}, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("ppo", {"clip_high_threshold": 3}, {"clip_low_threshold": 0.8, "clip_high_threshold": 3.0}),
        ("cispo", {"clip_low_threshold": 0.0}, {"clip_low_threshold": 0.0, "clip_high_threshold": 1.2}),
        ("dro", {"beta": 0.05}, {"beta": 0.05}),
        ("dro", {}, {}),
    ],
)
def test_defaults_are_filled_in(name: str, given: dict[str, float], complete: dict[str, float]) -> None:
    found = LOSSES[name].with_defaults(given)
    assert found == complete
    assert all(isinstance(value, float) for value in found.values())


def test_what_was_given_is_left_as_it_was() -> None:
    given: dict[str, float | str] = {"clip_high_threshold": 3.0}
    LOSSES["ppo"].with_defaults(given)
    assert given == {"clip_high_threshold": 3.0}
    assert LOSSES["ppo"].with_defaults({})["clip_high_threshold"] == 1.2


@pytest.mark.parametrize("shape", [(200,), (50, 4)])
def test_cross_entropy_weighs_each_target(shape: tuple[int, ...]) -> None:
    p, _, weights = material(shape=shape)
    loss, slope = in_torch("cross_entropy", p, {}, weights=weights)
    np.testing.assert_allclose(loss, -p * weights)
    np.testing.assert_allclose(slope, -weights)


def test_importance_sampling_weighs_by_the_ratio() -> None:
    p, q, advantages = material()
    loss, slope = in_torch("importance_sampling", p, {}, logprobs=q, advantages=advantages)
    expected = -np.exp(p) / np.exp(q) * advantages
    np.testing.assert_allclose(loss, expected)
    np.testing.assert_allclose(slope, expected)


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.5, 2.0), (0.0, 1.0)])
def test_ppo_takes_the_worse_of_free_and_bounded(low: float, high: float) -> None:
    """Case by case: a gain beyond the bound does not count, a loss beyond it does."""
    p, q, advantages = material()
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    loss, slope = in_torch("ppo", p, config, logprobs=q, advantages=advantages)
    for i, (ratio, advantage) in enumerate(zip(np.exp(p - q), advantages, strict=True)):
        if advantage > 0 and ratio > high:
            expected, expected_slope = -high * advantage, 0.0
        elif advantage < 0 and ratio < low:
            expected, expected_slope = -low * advantage, 0.0
        else:
            expected = expected_slope = -ratio * advantage
        assert loss[i] == pytest.approx(expected)
        assert slope[i] == pytest.approx(expected_slope)
    assert 10 < np.count_nonzero(slope == 0) < 190


def test_cispo_keeps_a_gradient_beyond_the_bounds() -> None:
    p, q, advantages = material()
    loss, slope = in_torch("cispo", p, {}, logprobs=q, advantages=advantages)
    weight = np.minimum(np.maximum(np.exp(p - q), 0.8), 1.2) * advantages
    np.testing.assert_allclose(loss, -weight * p)
    np.testing.assert_allclose(slope, -weight)


@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
def test_dro_pulls_towards_the_sampler(beta: float) -> None:
    p, q, advantages = material()
    loss, slope = in_torch("dro", p, {"beta": beta}, logprobs=q, advantages=advantages)
    np.testing.assert_allclose(loss, -(p * advantages - beta / 2 * (p - q) ** 2))
    np.testing.assert_allclose(slope, -(advantages - beta * (p - q)), atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.95, 1.05), (0.0, 0.5)])
def test_gspo_clips_the_geometric_mean_of_the_marked_ratios(low: float, high: float) -> None:
    """The gradient of each token is the ratio of the sequence times its advantage, or nothing where it is clipped."""
    p, q, advantages = material(seed=1)
    mask = (np.arange(200) % 4 != 0) * 2.5
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    inputs = {"logprobs": q, "advantages": advantages, "sequence_ratio_mask": mask}
    loss, slope = in_torch("gspo", p, config, **inputs)
    ratios = np.exp(p - q)[mask != 0]
    sequence = np.prod(ratios ** (1 / len(ratios)))
    assert 0.9 < sequence < 1.1
    for i, advantage in enumerate(advantages):
        clipped = (advantage > 0 and sequence > high) or (advantage < 0 and sequence < low)
        ratio = min(max(sequence, low), high) if clipped else sequence
        assert loss[i] == pytest.approx(-ratio * advantage)
        assert slope[i] == pytest.approx(0.0 if clipped else -sequence * advantage)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_bounds_of_a_token_are_its_own(name: str) -> None:
    """Each half of a sequence with bounds of its own is what it is with those bounds for all."""
    p, q, advantages = material(seed=2)
    first = np.arange(200) < 100
    inputs = {"logprobs": q, "advantages": advantages, "sequence_ratio_mask": np.ones(200)}
    low, high = np.where(first, 0.9, 0.2), np.where(first, 0.95, 3.0)
    both = in_torch(name, p, {}, **inputs, clip_low_threshold=low, clip_high_threshold=high)
    for half, config in ((first, (0.9, 0.95)), (~first, (0.2, 3.0))):
        whole = in_torch(
            name, p, dict(zip(("clip_low_threshold", "clip_high_threshold"), config, strict=True)), **inputs
        )
        for found, expected in zip(both, whole, strict=True):
            np.testing.assert_allclose(found[half], expected[half])


def test_one_bound_of_each_token_goes_with_the_other_as_a_number() -> None:
    p, q, advantages = material(seed=3)
    inputs = {"logprobs": q, "advantages": advantages}
    expected = in_torch("ppo", p, {"clip_high_threshold": 1.1}, **inputs)
    found = in_torch("ppo", p, {}, **inputs, clip_high_threshold=np.full(200, 1.1))
    np.testing.assert_allclose(found, expected)


def test_on_policy_all_policy_gradients_agree() -> None:
    """Where p is q the ratio is 1: every loss has the gradient -A."""
    p, _, advantages = material()
    bounds = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    for name in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        config = {"dro": {"beta": 0.3}, "gspo": bounds}.get(name, {})
        mask = np.ones_like(p)
        _, slope = in_torch(name, p, config, logprobs=p, advantages=advantages, sequence_ratio_mask=mask)
        np.testing.assert_allclose(slope, -advantages, err_msg=name)
