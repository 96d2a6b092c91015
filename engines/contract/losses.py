"""The contract of the built-in losses: values and gradients follow from the formulas, written out here once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from engines.contract.material import (
    Array,
    Caller,
    batch,
    distance,
    given,
    logprobs,
    policy_batch,
    supervised,
    weights,
)
from engines.interface import Engine
from engines.operations import Datum

Derivative = Callable[[Array, Array, Array, Mapping[str, float]], tuple[Array, Array]]
"""From p, q and A to the loss of each token and its derivative by p."""


def _importance_sampling(p: Array, q: Array, a: Array, config: Mapping[str, float]) -> tuple[Array, Array]:
    loss = -np.exp(p - q) * a
    return loss, loss


def _ppo(p: Array, q: Array, a: Array, config: Mapping[str, float]) -> tuple[Array, Array]:
    """The slope is that of r * A, and zero where the clipped product is the smaller one."""
    r = np.exp(p - q)
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    idle = ((a > 0) & (r > high)) | ((a < 0) & (r < low))
    loss = -np.where(idle, np.clip(r, low, high) * a, r * a)
    return loss, np.where(idle, 0.0, -r * a)


def _cispo(p: Array, q: Array, a: Array, config: Mapping[str, float]) -> tuple[Array, Array]:
    factor = np.clip(np.exp(p - q), config["clip_low_threshold"], config["clip_high_threshold"])
    return -factor * p * a, -factor * a


def _dro(p: Array, q: Array, a: Array, config: Mapping[str, float]) -> tuple[Array, Array]:
    beta = config["beta"]
    return -(p * a - 0.5 * beta * (p - q) ** 2), -(a - beta * (p - q))


BOUNDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
WIDE = {"clip_low_threshold": 0.6, "clip_high_threshold": 1.6}

CASES: list[tuple[str, dict[str, float], dict[str, float], Derivative]] = [
    ("importance_sampling", {}, {}, _importance_sampling),
    ("ppo", {}, BOUNDS, _ppo),
    ("ppo", WIDE, WIDE, _ppo),
    ("ppo", {"clip_high_threshold": 1.6}, BOUNDS | {"clip_high_threshold": 1.6}, _ppo),
    ("cispo", {}, BOUNDS, _cispo),
    ("cispo", WIDE, WIDE, _cispo),
    ("dro", {"beta": 0.05}, {"beta": 0.05}, _dro),
    ("dro", {"beta": 2.0}, {"beta": 2.0}, _dro),
]
"""Loss, the configuration that is sent, the one that it means, the formula."""


class LossContract:
    """Losses that the engine does not offer are skipped."""

    tolerance = 1e-5

    @pytest.mark.parametrize(("loss", "sent", "meant", "formula"), CASES)
    def test_a_loss_has_the_value_of_its_formula(
        self, engine: Engine, loss: str, sent: dict[str, float], meant: dict[str, float], formula: Derivative
    ) -> None:
        caller = self._trained(engine, loss)
        data = policy_batch(caller)
        result = caller.forward(data, loss, dict(sent))
        expected = sum(
            float(formula(*_arguments(p, datum), meant)[0].sum())
            for p, datum in zip(logprobs(result), data, strict=True)
        )
        assert result.metrics["loss:sum"] == pytest.approx(expected, rel=10 * self.tolerance)

    @pytest.mark.parametrize(("loss", "sent", "meant", "formula"), CASES)
    def test_a_loss_has_the_gradient_of_its_formula(
        self,
        engine: Engine,
        storage: Path,
        loss: str,
        sent: dict[str, float],
        meant: dict[str, float],
        formula: Derivative,
    ) -> None:
        """Cross-entropy with weights -dloss/dp has the same gradient: one step of either leads to the same weights."""
        caller = self._trained(engine, loss)
        caller.save("checkpoints/start")
        data = policy_batch(caller)
        now = logprobs(caller.forward(data, loss, dict(sent)))
        surrogate = [_surrogate(p, datum, meant, formula) for p, datum in zip(now, data, strict=True)]
        norms = []
        for own, name, config in ((data, loss, sent), (surrogate, "cross_entropy", {})):
            caller.load("checkpoints/start")
            caller.forward_backward(own, name, dict(config))
            norms.append(caller.step(eps=1.0))
            caller.save(f"checkpoints/{name}")
        start, found, expected = (
            weights(storage, f"checkpoints/{name}") for name in ("start", loss, "cross_entropy")
        )
        assert norms[0] == pytest.approx(norms[1], rel=10 * self.tolerance)
        for name, values in expected.items():
            assert distance([found[name] - start[name]], [values - start[name]]) < 100 * self.tolerance, name

    def test_losses_of_several_calls_add_up(self, engine: Engine) -> None:
        """Different losses in one step: the gradient is the sum of theirs."""
        caller = self._trained(engine, "importance_sampling")
        caller.save("checkpoints/start")
        first, second = batch(caller.info), policy_batch(caller)
        now = logprobs(caller.forward(second, "importance_sampling"))
        slopes = [
            _surrogate(p, datum, {}, _importance_sampling) for p, datum in zip(now, second, strict=True)
        ]
        caller.forward_backward(first)
        caller.forward_backward(second, "importance_sampling")
        norm = caller.step()
        caller.load("checkpoints/start")
        caller.forward_backward([*first, *slopes])
        assert caller.step() == pytest.approx(norm, rel=10 * self.tolerance)

    def _trained(self, engine: Engine, loss: str) -> Caller:
        """A run whose adapter is not zero any more."""
        caller = Caller(engine)
        if loss not in caller.info.losses:
            pytest.skip(f"this engine has no {loss}")
        caller.create()
        caller.train(batch(caller.info), 2)
        return caller


def _arguments(p: Array, datum: Datum) -> tuple[Array, Array, Array]:
    """p, q and A in float64."""
    q, a = given(datum, "logprobs"), given(datum, "advantages")
    return p.astype(np.float64), q.astype(np.float64), a.astype(np.float64)


def _surrogate(p: Array, datum: Datum, config: Mapping[str, float], formula: Derivative) -> Datum:
    slope = formula(*_arguments(p, datum), config)[1]
    return supervised(datum.tokens.array().tolist(), given(datum, "target_tokens"), -slope)
