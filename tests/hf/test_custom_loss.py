"""A traced loss in the engine: what it gives, what reaches the weights, and what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines.contract.material import (
    Caller,
    distance,
    given,
    logprobs,
    only,
    policy_batch,
    supervised,
    with_inputs,
)
from engines.graphs import CustomLoss
from engines.hf import HfEngine
from engines.interface import RunOperation, UserError
from engines.operations import Datum, Forward, ForwardBackward
from engines.tensors import Tensor
from tests.engines.traced import Function, neutral, traced
from tests.hf.conftest import MakeEngine

T = torch.Tensor


def clipped(logprobs: T, advantages: T, weights: T) -> tuple[T, dict[str, T]]:
    ratio = torch.exp(logprobs - logprobs.detach() + 0.1 * weights).clamp(0.5, 2.0)
    loss = -(ratio * advantages)[1:].sum() - torch.softmax(logprobs, 0)[0]
    return loss, {"custom/last:sum": logprobs[-1], "custom/last:mean": logprobs[-1]}


def soft(logprobs: T, share: T) -> tuple[T, dict[str, T]]:
    return -(torch.softmax(share, dim=-1) * logprobs).sum(), {}


def run(caller: Caller, loss: CustomLoss, data: list[Datum], kind: Any = ForwardBackward) -> Any:
    operation = kind(data, "custom", {}, loss)
    verb = caller.engine.forward_backward if kind is ForwardBackward else caller.engine.forward
    return only(verb([RunOperation("run", operation)]))


@pytest.fixture
def caller(make_engine: MakeEngine) -> Caller:
    """Passes of 12 tokens, so that the data are spread over several."""
    caller = Caller(make_engine(pass_tokens=12))
    caller.create()
    caller.train(policy_free(caller), 2)
    return caller


def policy_free(caller: Caller) -> list[Datum]:
    tokens = [5, 9, 17, 33, 40, 41]
    return [supervised(tokens[:-1], tokens[1:])]


def weighted(caller: Caller) -> list[Datum]:
    data = policy_batch(caller, (9, 5, 2, 7))
    return [with_inputs(datum, weights=np.linspace(-1, 1, len(given(datum, "advantages")))) for datum in data]


def two_dimensional(caller: Caller) -> list[Datum]:
    rng = np.random.default_rng(4)
    data = []
    for length, k in ((6, 3), (4, 1), (5, 2)):
        datum = supervised(rng.integers(0, 250, length).tolist(), rng.integers(0, 250, (length, k)))
        data.append(with_inputs(datum, share=rng.normal(0, 1, (length, k))))
    return data


def in_torch(
    function: Function, p: Any, datum: Datum, names: list[str]
) -> tuple[float, Any, dict[str, float]]:
    """Loss, slope and metrics of one datum, by torch."""
    leaf = torch.from_numpy(p.copy()).requires_grad_()
    inputs = [torch.from_numpy(given(datum, name).copy()) for name in names]
    total, metrics = function(leaf, *inputs)
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad.numpy(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("function", "ranks", "data_of"),
    [
        (clipped, {"logprobs": 1, "advantages": 1, "weights": 1}, weighted),
        (soft, {"logprobs": 2, "share": 2}, two_dimensional),
    ],
)
def test_value_metrics_and_gradient_are_those_of_the_function(
    caller: Caller, function: Function, ranks: dict[str, int], data_of: Any
) -> None:
    """Its gradient is that of cross-entropy with weights of minus its slope: what the SDK makes of it on the client."""
    data = data_of(caller)
    loss = neutral(traced(function, **ranks))
    names = list(ranks)[1:]
    before = run(caller, loss, data, Forward)
    assert caller.step() == 0.0
    expected = [in_torch(function, p, datum, names) for p, datum in zip(logprobs(before), data, strict=True)]
    caller.save("checkpoints/start")
    found = run(caller, loss, data)
    assert found.metrics["loss:sum"] == pytest.approx(sum(value for value, _, _ in expected), rel=1e-5)
    assert found.metrics == pytest.approx(before.metrics, rel=1e-5)
    for name in expected[0][2]:
        total = sum(metrics[name] for _, _, metrics in expected)
        mean = total / len(data) if name.endswith(":mean") else total
        assert found.metrics[name] == pytest.approx(mean, rel=1e-5)
    for output, p in zip(logprobs(found), logprobs(before), strict=True):
        assert distance([output], [p]) < 1e-5
    norm = caller.step(eps=1.0)
    caller.load("checkpoints/start")
    surrogates = [
        supervised(datum.tokens.array().tolist(), given(datum, "target_tokens"), -slope)
        for datum, (_, slope, _) in zip(data, expected, strict=True)
    ]
    caller.forward_backward(surrogates)
    assert caller.step(eps=1.0) == pytest.approx(norm, rel=1e-5)
    assert norm > 0


def test_a_scalar_and_whole_numbers_are_inputs_too(caller: Caller) -> None:
    """Protobuf cannot tell a tensor without dimensions from one with one number."""

    def scaled(logprobs: T, scale: T, target_tokens: T) -> tuple[T, dict[str, T]]:
        return (logprobs * target_tokens).sum() * scale, {"custom/scale:mean": scale}

    loss = neutral(traced(scaled, logprobs=1, scale=0, target_tokens=1))
    for shape in ((), (1,)):
        datum = policy_free(caller)[0]
        scale = Tensor("float32", shape, np.float32(0.25).tobytes())
        datum = Datum(datum.tokens, {**datum.loss_inputs, "scale": scale})
        result = run(caller, loss, [datum])
        expected = float((logprobs(result)[0] * given(datum, "target_tokens")).sum()) * 0.25
        assert result.metrics == pytest.approx({"loss:sum": expected, "custom/scale:mean": 0.25}, rel=1e-5)


def failing(logprobs: T, weights: T) -> tuple[T, dict[str, T]]:
    return logprobs[weights.long()].sum(), {}


def constant(logprobs: T, weights: T) -> tuple[T, dict[str, T]]:
    return weights.sum(), {}


def infinite(logprobs: T, weights: T) -> tuple[T, dict[str, T]]:
    return torch.exp(-1000 * logprobs).sum(), {}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (failing, r"data\[1\]: getitem: operator.getitem: index 77 is out of bounds"),
        (constant, r"data\[0\]: the loss does not depend on logprobs"),
        (infinite, r"custom: the loss is inf"),
    ],
)
def test_a_loss_that_fails_leaves_the_run_as_it_was(caller: Caller, function: Function, words: str) -> None:
    """In the second of two data: what the first has given is thrown away."""
    tokens = [5, 9, 17, 33]
    good = supervised(tokens, tokens, [0, 1, 2, 3])
    bad = supervised([*tokens, 34, 35], [*tokens, 34, 35], [0, 1, 77, 3, 4, 5])
    before = caller.logprobs([good])
    with pytest.raises(UserError, match=words):
        run(caller, neutral(traced(function, logprobs=1, weights=1)), [good, bad])
    assert caller.step() == 0.0
    assert np.array_equal(caller.logprobs([good])[0], before[0])


def test_a_datum_that_fails_leaves_the_others_of_its_pass_as_they_were(make_engine: MakeEngine) -> None:
    """One pass, three runs: a traced loss fails over its second datum, a weight of another's is infinite, the third
    gets the numbers that it has alone."""
    shared, alone = Caller(make_engine()), Caller(make_engine())
    passes: list[int] = []
    shared.engine.base.decoder.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[attr-defined]
    for name in ("traced", "infinite", "fine"):
        shared.create(name)
    alone.create("fine")
    tokens = [5, 9, 17, 33]
    good = supervised(tokens, tokens, [0, 1, 2, 3])
    bad = supervised([*tokens, 34, 35], [*tokens, 34, 35], [0, 1, 77, 3, 4, 5])
    endless = supervised(tokens, tokens, [1, float("inf"), 1, 1])
    loss = neutral(traced(failing, logprobs=1, weights=1))
    items = [
        RunOperation("traced", ForwardBackward([good, bad], "custom", {}, loss)),
        RunOperation("infinite", ForwardBackward([good, endless], "cross_entropy")),
        RunOperation("fine", ForwardBackward([good, good], "cross_entropy")),
    ]
    refused, overflown, fine = shared.engine.forward_backward(items)
    assert len(passes) == 1
    assert isinstance(refused, UserError) and "data[1]: getitem" in str(refused)
    assert isinstance(overflown, UserError) and "no effect" in str(overflown)
    expected = only(alone.engine.forward_backward(items[2:]))
    assert fine.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)  # type: ignore[union-attr]
    norms = [caller.step("fine") for caller in (shared, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0
    assert shared.step("traced") == shared.step("infinite") == 0.0


def test_the_engine_says_that_it_computes_them(engine: HfEngine) -> None:
    assert "custom" in engine.info().losses
