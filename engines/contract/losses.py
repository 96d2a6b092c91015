"""The contract of the built-in losses: values and gradients follow from the formulas, written out here once more.

The gradient is compared with what torch's autograd makes of the formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.contract.material import (
    Caller,
    batch,
    distance,
    given,
    logprobs,
    policy_batch,
    supervised,
    weights,
    with_inputs,
)
from engines.interface import Engine, UserError
from engines.operations import Datum, LossConfig

Values = Mapping[str, torch.Tensor]
Formula = Callable[[torch.Tensor, Values], torch.Tensor]
"""From p, and the inputs and settings by name, to the loss of each token of one datum."""


def _cross_entropy(p: torch.Tensor, values: Values) -> torch.Tensor:
    return -(p * values["weights"])


def _importance_sampling(p: torch.Tensor, values: Values) -> torch.Tensor:
    return -torch.exp(p - values["logprobs"]) * values["advantages"]


def _ppo(p: torch.Tensor, values: Values) -> torch.Tensor:
    return _worse(torch.exp(p - values["logprobs"]), values)


def _cispo(p: torch.Tensor, values: Values) -> torch.Tensor:
    ratio = torch.exp(p - values["logprobs"]).detach()
    return -_within(ratio, values) * p * values["advantages"]


def _dro(p: torch.Tensor, values: Values) -> torch.Tensor:
    return -(p * values["advantages"] - 0.5 * values["beta"] * (p - values["logprobs"]) ** 2)


def _gspo(p: torch.Tensor, values: Values) -> torch.Tensor:
    marked = values["sequence_ratio_mask"] != 0
    sequence = torch.exp((p.detach() - values["logprobs"])[marked].mean())
    return _worse(sequence * torch.exp(p - p.detach()), values)


def _worse(ratio: torch.Tensor, values: Values) -> torch.Tensor:
    """What ppo does: a gain beyond the bounds does not count, a loss beyond them does."""
    advantages = values["advantages"]
    bounded = _within(ratio, values)
    return -torch.where(ratio * advantages <= bounded * advantages, ratio, bounded) * advantages


def _within(ratio: torch.Tensor, values: Values) -> torch.Tensor:
    low, high = values["clip_low_threshold"], values["clip_high_threshold"]
    return torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))


BOUNDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
WIDE = {"clip_low_threshold": 0.6, "clip_high_threshold": 1.6}

CASES: list[tuple[str, dict[str, float], dict[str, float], Formula]] = [
    ("cross_entropy", {}, {}, _cross_entropy),
    ("importance_sampling", {}, {}, _importance_sampling),
    ("ppo", {}, BOUNDS, _ppo),
    ("ppo", WIDE, WIDE, _ppo),
    ("ppo", {"clip_high_threshold": 1.6}, BOUNDS | {"clip_high_threshold": 1.6}, _ppo),
    ("cispo", {}, BOUNDS, _cispo),
    ("cispo", WIDE, WIDE, _cispo),
    ("dro", {"beta": 0.05}, {"beta": 0.05}, _dro),
    ("dro", {"beta": 2.0}, {"beta": 2.0}, _dro),
    ("gspo", BOUNDS, BOUNDS, _gspo),
    ("gspo", {"clip_low_threshold": 0.97, "clip_high_threshold": 1.03},
     {"clip_low_threshold": 0.97, "clip_high_threshold": 1.03}, _gspo),
]  # fmt: skip
"""Loss, the configuration that is sent, the one that it means, the formula."""
CLIPPED: list[tuple[str, Formula]] = [("ppo", _ppo), ("cispo", _cispo), ("gspo", _gspo)]


class LossContract:
    """Losses that the engine does not offer are skipped."""

    tolerance = 1e-5

    @pytest.mark.parametrize(("loss", "sent", "meant", "formula"), CASES)
    def test_a_loss_has_the_value_of_its_formula(
        self, engine: Engine, loss: str, sent: dict[str, float], meant: dict[str, float], formula: Formula
    ) -> None:
        caller = self._trained(engine, loss)
        self._assert_value(caller, data_for(caller, loss), loss, sent, meant, formula)

    @pytest.mark.parametrize(("loss", "sent", "meant", "formula"), CASES)
    def test_a_loss_has_the_gradient_of_its_formula(
        self,
        engine: Engine,
        storage: Path,
        loss: str,
        sent: dict[str, float],
        meant: dict[str, float],
        formula: Formula,
    ) -> None:
        caller = self._trained(engine, loss)
        self._assert_gradient(caller, storage, data_for(caller, loss), loss, sent, meant, formula)

    @pytest.mark.parametrize(("loss", "formula"), CLIPPED)
    def test_bounds_of_each_token_win(
        self, engine: Engine, storage: Path, loss: str, formula: Formula
    ) -> None:
        """One datum brings both bounds, one brings the upper one, one none: numbers stand in for what is missing."""
        caller = self._trained(engine, loss)
        first, second, *rest = data_for(caller, loss)
        rng = np.random.default_rng(3)
        length = len(given(first, "advantages"))
        low = rng.uniform(0.3, 1.0, length)
        both = with_inputs(first, clip_low_threshold=low, clip_high_threshold=low + rng.uniform(0, 1, length))
        upper = with_inputs(
            second, clip_high_threshold=rng.uniform(0.9, 2.0, len(given(second, "advantages")))
        )
        data = [both, upper, *rest]
        assert any(p != q for p, q in pairwise(given(both, "clip_low_threshold")))
        self._assert_value(caller, data, loss, BOUNDS, BOUNDS, formula)
        self._assert_gradient(caller, storage, data, loss, BOUNDS, BOUNDS, formula)

    @pytest.mark.parametrize(("loss", "formula"), CLIPPED)
    def test_equal_bounds_for_each_token_are_the_same_as_numbers(
        self, engine: Engine, loss: str, formula: Formula
    ) -> None:
        caller = self._trained(engine, loss)
        data = data_for(caller, loss)
        tensors = [
            with_inputs(datum, **{name: np.full(datum.tokens.shape, value) for name, value in BOUNDS.items()})
            for datum in data
        ]
        by_number = caller.forward_backward(data, loss, dict(BOUNDS)).metrics["loss:sum"]
        norm = caller.step(learning_rate=0.0)
        by_token = caller.forward_backward(tensors, loss).metrics["loss:sum"]
        assert by_token == pytest.approx(by_number, rel=self.tolerance)
        assert caller.step(learning_rate=0.0) == pytest.approx(norm, rel=self.tolerance)

    def test_the_ratio_of_a_sequence_is_its_own(self, engine: Engine) -> None:
        """Data in one call and in calls of their own have the same loss; a mask on one token is that token's ratio."""
        caller = self._trained(engine, "gspo")
        data = data_for(caller, "gspo")
        together = caller.forward(data, "gspo", dict(WIDE)).metrics["loss:sum"]
        alone = sum(caller.forward([datum], "gspo", dict(WIDE)).metrics["loss:sum"] for datum in data)
        assert together == pytest.approx(alone, rel=10 * self.tolerance)
        mask = np.zeros(len(given(data[0], "advantages")))
        mask[2] = -3.0  # any number but 0 marks
        result = caller.forward([with_inputs(data[0], sequence_ratio_mask=mask)], "gspo", dict(WIDE))
        p, q, a = logprobs(result)[0][2], given(data[0], "logprobs")[2], given(data[0], "advantages")
        r = np.exp(np.float64(p) - q)
        expected = -np.minimum(r * a, np.clip(r, 0.6, 1.6) * a).sum(dtype=np.float64)
        assert result.metrics["loss:sum"] == pytest.approx(expected, rel=10 * self.tolerance)

    @pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "gspo"])
    def test_a_ratio_that_overflows_fails_without_effect(self, engine: Engine, loss: str) -> None:
        """A negative advantage makes the unbounded ratio count."""
        caller = self._trained(engine, loss)
        data = data_for(caller, loss)
        config: LossConfig = {**BOUNDS} if loss == "gspo" else {}
        before = caller.logprobs(data_for(caller, "cross_entropy"))
        far = [
            with_inputs(
                datum, logprobs=np.full(datum.tokens.shape, -200.0), advantages=-np.ones(datum.tokens.shape)
            )
            for datum in data
        ]
        with pytest.raises(UserError, match=f"{loss}: the loss is inf"):
            caller.forward_backward(far, loss, config)
        assert caller.step() == 0.0
        after = caller.logprobs(data_for(caller, "cross_entropy"))
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))

    def test_losses_of_several_calls_add_up(self, engine: Engine) -> None:
        """Different losses in one step: the gradient is the sum of theirs."""
        caller = self._trained(engine, "importance_sampling")
        caller.save("checkpoints/start")
        first, second = batch(caller.info), policy_batch(caller)
        slopes = self._surrogates(caller, second, "importance_sampling", {}, {}, _importance_sampling)
        caller.forward_backward(first)
        caller.forward_backward(second, "importance_sampling")
        norm = caller.step()
        caller.load("checkpoints/start")
        caller.forward_backward([*first, *slopes])
        assert caller.step() == pytest.approx(norm, rel=10 * self.tolerance)

    # ------------------------------------------------------------------ how both are compared

    def _assert_value(
        self,
        caller: Caller,
        data: list[Datum],
        loss: str,
        sent: dict[str, float],
        meant: dict[str, float],
        formula: Formula,
    ) -> None:
        result = caller.forward(data, loss, dict(sent))
        expected = sum(
            float(formula(torch.from_numpy(p.astype(np.float64)), _values(datum, meant)).sum())
            for p, datum in zip(logprobs(result), data, strict=True)
        )
        assert result.metrics["loss:sum"] == pytest.approx(expected, rel=10 * self.tolerance)

    def _assert_gradient(
        self,
        caller: Caller,
        storage: Path,
        data: list[Datum],
        loss: str,
        sent: dict[str, float],
        meant: dict[str, float],
        formula: Formula,
    ) -> None:
        """Cross-entropy with weights -dloss/dp has the same gradient: one step of either leads to the same weights."""
        caller.save("checkpoints/start")
        surrogates = self._surrogates(caller, data, loss, sent, meant, formula)
        norms = []
        for own, name, config, folder in (
            (data, loss, sent, "found"),
            (surrogates, "cross_entropy", {}, "meant"),
        ):
            caller.load("checkpoints/start")
            caller.forward_backward(own, name, dict(config))
            norms.append(caller.step(eps=1.0))
            caller.save(f"checkpoints/{folder}")
        start, found, expected = (
            weights(storage, f"checkpoints/{name}") for name in ("start", "found", "meant")
        )
        assert norms[0] == pytest.approx(norms[1], rel=10 * self.tolerance)
        assert norms[0] > 0
        for name, values in expected.items():
            assert distance([found[name] - start[name]], [values - start[name]]) < 100 * self.tolerance, name

    def _surrogates(
        self,
        caller: Caller,
        data: list[Datum],
        loss: str,
        sent: dict[str, float],
        meant: dict[str, float],
        formula: Formula,
    ) -> list[Datum]:
        """Cross-entropy data whose weights are what autograd makes of the formula."""
        now = logprobs(caller.forward(data, loss, dict(sent)))
        surrogates = []
        for p, datum in zip(now, data, strict=True):
            leaf = torch.from_numpy(p.astype(np.float64)).requires_grad_()
            formula(leaf, _values(datum, meant)).sum().backward()
            assert leaf.grad is not None
            targets = given(datum, "target_tokens")
            surrogates.append(supervised(datum.tokens.array().tolist(), targets, -leaf.grad.numpy()))
        return surrogates

    def _trained(self, engine: Engine, loss: str) -> Caller:
        """A run whose adapter is not zero any more."""
        caller = Caller(engine)
        if loss not in caller.info.losses:
            pytest.skip(f"this engine has no {loss}")
        caller.create()
        caller.train(batch(caller.info), 2)
        return caller


def data_for(caller: Caller, loss: str) -> list[Datum]:
    """Data that the loss takes: for cross-entropy [N] beside [N, K], for gspo with tokens left out of the ratio."""
    if loss == "cross_entropy":
        return [*batch(caller.info), *_several_targets(caller)]
    data = policy_batch(caller)
    if loss != "gspo":
        return data
    masks = [np.arange(len(given(datum, "advantages"))) % 3 != 1 for datum in data]
    return [with_inputs(datum, sequence_ratio_mask=mask) for datum, mask in zip(data, masks, strict=True)]


def _several_targets(caller: Caller) -> list[Datum]:
    rng = np.random.default_rng(5)
    return [
        supervised(
            datum.tokens.array().tolist(),
            rng.permutation(caller.info.vocab_size)[: length * k].reshape(length, k),
            rng.normal(0, 1, (length, k)),
        )
        for datum, length, k in (
            (plain, plain.tokens.shape[0], 2 + i) for i, plain in enumerate(batch(caller.info))
        )
    ]


def _values(datum: Datum, settings: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Settings and loss inputs by name, in float64; an input wins over the setting of its name."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in settings.items()}
    inputs = {name: torch.from_numpy(given(datum, name).astype(np.float64)) for name in datum.loss_inputs}
    return {**numbers, **inputs}
