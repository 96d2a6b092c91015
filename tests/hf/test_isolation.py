"""Packing, micro-batches, neighbours and failures leave no mark on a run's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.hf import HfEngine
from engines.interface import RunOperation, UserError
from engines.operations import (
    Datum,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    LoraSpec,
    OptimStep,
    SaveWeights,
    SaveWeightsResult,
)
from engines.tensors import Tensor
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    create,
    difference,
    forward,
    forward_backward,
    logprobs,
    numbers,
    reinforced,
    step,
    supervised,
    train,
)

LENGTHS = [31, 4, 17, 17, 9, 1, 17, 26]


def pending(engine: HfEngine, run_id: str = "run") -> torch.Tensor:
    gradient = engine.runs[run_id].pending
    assert gradient is not None
    return gradient.values


@pytest.mark.parametrize("pass_tokens", [1, 30, 60, 4096])
def test_packed_equals_one_by_one(make_engine: MakeEngine, pass_tokens: int) -> None:
    """However the data are packed: the same log-probs, loss and gradient as one call for each datum."""
    engine = make_engine(pass_tokens=pass_tokens)
    data = supervised(LENGTHS)
    for run_id in ("together", "apart"):
        create(engine, run_id)
        train(engine, supervised([10, 6], seed=3), 3, run_id)
    together = forward_backward(engine, data, run_id="together")
    apart = [forward_backward(engine, [datum], run_id="apart") for datum in data]
    for found, single in zip(logprobs(together), apart, strict=True):
        np.testing.assert_allclose(found, logprobs(single)[0], rtol=0, atol=1e-5)
    total = sum(single.metrics["loss:sum"] for single in apart)
    assert together.metrics["loss:sum"] == pytest.approx(total, rel=1e-6)
    assert difference(pending(engine, "together"), pending(engine, "apart")) <= 1e-5


def test_forward_gives_the_same_and_changes_nothing(engine: HfEngine) -> None:
    create(engine)
    train(engine, supervised([10, 6], seed=3), 2)
    data = supervised(LENGTHS)
    before = engine.runs["run"].adapter.values.clone()
    first = forward(engine, data)
    assert engine.runs["run"].pending is None
    second = forward_backward(engine, data)
    gradient = pending(engine).clone()
    assert forward(engine, data).outputs == first.outputs
    for found, expected in zip(logprobs(first), logprobs(second), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(engine.runs["run"].adapter.values, before)
    assert torch.equal(pending(engine), gradient)


Pass = tuple[list[Datum], str]


def of_many_kinds(engine: HfEngine, run_id: str, number: int) -> Pass:
    """Step `number` of a run: lengths and kind of loss are its own; every third run has several targets a position."""
    kind = int(run_id) % 3
    lengths = [3 + (5 * int(run_id) + number) % 29, 7 + int(run_id)][: 1 + int(run_id) % 2]
    seed = 100 * int(run_id) + number
    if kind == 1:
        return reinforced(engine, lengths, run_id, seed), "importance_sampling"
    return (several_targets(lengths, seed) if kind == 2 else supervised(lengths, seed)), "cross_entropy"


def several_targets(lengths: list[int], seed: int) -> list[Datum]:
    """Three weighted targets at each position."""
    data = []
    for i, length in enumerate(lengths):
        rng = np.random.default_rng(seed + i)
        inputs = {
            "target_tokens": Tensor.of(rng.integers(0, 256, (length, 3)).astype(np.int64)),
            "weights": Tensor.of(rng.uniform(0, 1, (length, 3)).astype(np.float32)),
        }
        data.append(Datum(Tensor.of(rng.integers(0, 256, length).astype(np.int32)), inputs))
    return data


@pytest.mark.parametrize(("deterministic", "pass_tokens"), [(True, 4096), (False, 4096), (False, 50)])
def test_sixteen_runs_do_not_know_each_other(
    make_engine: MakeEngine, deterministic: bool, pass_tokens: int
) -> None:
    """Runs of several ranks, losses and numbers of targets in the same calls, 20 steps: each as if it were alone, to
    the last bit in deterministic mode."""
    names = [str(number) for number in range(16)]
    specs = {name: LoraSpec(rank=(2, 4, 8)[int(name) % 3], seed=int(name) + 1) for name in names}
    crowd, alone = (
        make_engine(deterministic=deterministic, pass_tokens=pass_tokens, threads=1) for _ in range(2)
    )
    for engine in (crowd, alone):
        for name in names:
            create(engine, name, specs[name])
    for number in range(20):
        passes = {name: of_many_kinds(alone, name, number) for name in names}
        items = [RunOperation(name, ForwardBackward(*passes[name])) for name in names]
        for name, outcome in zip(names, crowd.forward_backward(items), strict=True):
            assert isinstance(outcome, ForwardResult)
            single = forward_backward(alone, *passes[name], run_id=name)
            assert outcome.metrics["loss:sum"] == pytest.approx(
                single.metrics["loss:sum"], rel=1e-5, abs=1e-5
            )
            step(alone, name, learning_rate=1e-3)
        crowd.optim_step([RunOperation(name, OptimStep(learning_rate=1e-3)) for name in names])
    for name in names:
        together, by_itself = (engine.runs[name].adapter.values for engine in (crowd, alone))
        if deterministic:
            assert torch.equal(together, by_itself)
        assert difference(together, by_itself) <= 1e-5


def test_runs_share_passes_unless_the_engine_is_deterministic(make_engine: MakeEngine) -> None:
    for deterministic, expected in ((False, 1), (True, 4)):
        engine = make_engine(deterministic=deterministic)
        names = [str(number) for number in range(4)]
        for name in names:
            create(engine, name)
        passes: list[int] = []
        engine.base.decoder.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        items = [RunOperation(name, ForwardBackward(supervised([5, 3]), "cross_entropy")) for name in names]
        assert all(isinstance(outcome, ForwardResult) for outcome in engine.forward_backward(items))
        assert len(passes) == expected


def replaced(datum: Datum, name: str, value: float) -> Datum:
    """The datum with one number of a loss input exchanged."""
    changed = numbers(datum.loss_inputs[name]).copy()
    changed[0] = value
    return Datum(datum.tokens, {**datum.loss_inputs, name: Tensor.of(changed)})


@pytest.mark.parametrize("pass_tokens", [8, 4096])
@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 3e38])
def test_a_failed_operation_has_no_effect(make_engine: MakeEngine, weight: float, pass_tokens: int) -> None:
    """Also when only its last pass is bad, and beside another run's operation that is good."""
    engine = make_engine(pass_tokens=pass_tokens)
    for run_id in ("run", "other"):
        create(engine, run_id)
        train(engine, supervised([10, 6], seed=3), 2, run_id)
    forward_backward(engine, supervised([7], seed=1))
    before = pending(engine).clone()
    good, last = supervised([5, 9], seed=2)
    items = [
        RunOperation("run", ForwardBackward([good, replaced(last, "weights", weight)], "cross_entropy")),
        RunOperation("other", ForwardBackward([good, last], "cross_entropy")),
    ]
    bad, fine = engine.forward_backward(items)
    assert isinstance(bad, UserError) and "no effect" in str(bad)
    assert isinstance(fine, ForwardResult)
    assert torch.equal(pending(engine), before)
    step(engine, learning_rate=1e-2)
    assert engine.runs["run"].adapter.values.isfinite().all()


def test_a_gradient_that_overflows_has_no_effect(engine: HfEngine) -> None:
    """The loss is 0 and finite, the gradient is not."""
    create(engine)
    train(engine, supervised([10, 6], seed=3), 2)
    tokens = Tensor.of(np.array([1, 2], dtype=np.int32))
    inputs = {
        "target_tokens": Tensor.of(np.array([[5, 5], [6, 6]], dtype=np.int64)),
        "weights": Tensor.of(np.array([[3e38, -3e38], [3e38, 3e38]], dtype=np.float32)),
    }
    items = [RunOperation("run", ForwardBackward([Datum(tokens, inputs)], "cross_entropy"))]
    assert isinstance(engine.forward_backward(items)[0], UserError)
    assert engine.runs["run"].pending is None


def test_gradients_whose_sum_overflows_stop_the_step_and_nothing_else(engine: HfEngine) -> None:
    """Each gradient is finite. The run goes on from a checkpoint, which leaves the gradient behind."""
    create(engine)
    train(engine, supervised([10, 6], seed=3), 2)
    save = SaveWeights("checkpoints/whole", optimizer_state=True)
    assert isinstance(engine.save_weights([RunOperation("run", save)])[0], SaveWeightsResult)
    data = supervised([10, 6], seed=4)
    forward_backward(engine, data)
    gradient = pending(engine)
    gradient.mul_(3e38 / gradient.abs().max())
    peak = gradient.clone()
    gradient.add_(peak)
    run = engine.runs["run"]
    before, steps = run.adapter.values.clone(), run.optimizer.steps
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"norm inf; it must be finite.*no effect.*still there.*load_state"
        ):
            step(engine, grad_clip_norm=1.0)
        assert torch.equal(run.adapter.values, before) and run.optimizer.steps == steps
    load = LoadWeights("checkpoints/whole", optimizer_state=True)
    engine.load_weights([RunOperation("run", load)])
    forward_backward(engine, data)
    assert 0 < step(engine)["unclipped_grad_l2:mean"] < 1e9


def test_a_step_without_a_gradient_changes_nothing(engine: HfEngine) -> None:
    create(engine)
    train(engine, supervised([10, 6], seed=3), 1)
    run = engine.runs["run"]
    before = run.adapter.values.clone()
    assert step(engine, learning_rate=1.0, weight_decay=0.5) == {"unclipped_grad_l2:mean": 0.0}
    assert torch.equal(run.adapter.values, before)
    assert run.optimizer.steps == 1


def test_creating_a_run_again_replaces_it(engine: HfEngine) -> None:
    create(engine)
    train(engine, supervised([10, 6], seed=3), 1)
    forward_backward(engine, supervised([6]))
    create(engine, spec=LoraSpec(rank=2, seed=8))
    assert engine.runs["run"].pending is None
    assert engine.runs["run"].adapter.spec.rank == 2
    engine.drop_run("run")
    engine.drop_run("run")
    assert engine.stats()["resident_runs"] == 0
