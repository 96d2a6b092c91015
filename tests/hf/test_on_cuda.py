"""The engine on a CUDA device: the numbers of the CPU in float32, common passes in bfloat16, nothing waited for.

pytest tests/hf/test_on_cuda.py
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engines.hf import HfEngine, training
from engines.interface import RunOperation
from engines.operations import ForwardBackward, LoraSpec
from engines.tuning.grouped import GroupedRouting
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    create,
    difference,
    forward,
    logprobs,
    numbers,
    request,
    sample_all,
    saved,
    step,
    supervised,
    text,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = {
    "a": LoraSpec(rank=8, seed=1),
    "b": LoraSpec(rank=8, seed=2),
    "c": LoraSpec(rank=16, seed=3, train_unembed=False),
    "d": LoraSpec(rank=4, seed=4, train_mlp=False),
}
"""Two of one shape, one of its own, one whose rank is no multiple of eight."""
LENGTHS = {"a": [30, 11], "b": [64], "c": [5, 17, 40], "d": [23]}
LOSS: dict[str, str] = {
    "a": "cross_entropy",
    "b": "cross_entropy",
    "c": "cross_entropy",
    "d": "cross_entropy",
}


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def trained(engine: HfEngine, names: str, steps: int = 3, *, apart: bool = False) -> dict[str, list[float]]:
    """Losses of each run by step; all runs in one call, or one call each."""
    losses: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        create(engine, name, SPECS[name])
    for number in range(steps):
        items = [
            RunOperation(name, ForwardBackward(supervised(LENGTHS[name], seed=number), LOSS[name]))
            for name in names
        ]
        for some in [[item] for item in items] if apart else [items]:
            for item, result in zip(some, engine.forward_backward(some), strict=True):
                assert not isinstance(result, Exception), result
                losses[item.run_id].append(result.metrics["loss:sum"])
        for name in names:
            step(engine, name, learning_rate=1e-3)
    return losses


def moved(engine: HfEngine, name: str) -> torch.Tensor:
    return engine.runs[name].adapter.values.cpu()


@pytest.mark.parametrize("model", ["tied", "untied", "llama", "moe"])
def test_float32_gives_the_numbers_of_the_cpu(make_engine: MakeEngine, model: str) -> None:
    here, there = make_engine(model), make_engine(model, device="cuda", dtype="float32")
    expected, found = trained(here, "abcd"), trained(there, "abcd")
    for name in SPECS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
        assert difference(moved(there, name), moved(here, name)) < 2e-3


@pytest.mark.parametrize("model", ["tied", "llama", "moe"])
def test_bfloat16_is_close_to_float32(make_engine: MakeEngine, model: str) -> None:
    """Losses, and the direction of the first gradient, against the float32 of the CPU."""
    here, there = make_engine(model), make_engine(model, device="cuda")
    assert there.info().dtype == "bfloat16"
    assert isinstance(there.base.routing, GroupedRouting)
    for engine in (here, there):
        for name, spec in SPECS.items():
            create(engine, name, spec)
        items = [RunOperation(name, ForwardBackward(supervised(LENGTHS[name]), LOSS[name])) for name in SPECS]
        results = engine.forward_backward(items)
        assert not any(isinstance(result, Exception) for result in results)
    for name in SPECS:
        ours, theirs = (engine.runs[name].pending.values.cpu().double() for engine in (there, here))  # type: ignore[union-attr]
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
        data = supervised(LENGTHS[name])
        mine, reference = (
            np.concatenate([row.ravel() for row in logprobs(forward(engine, data, run_id=name))])
            for engine in (there, here)
        )
        assert np.abs(mine - reference).mean() < 0.05


def test_runs_together_are_each_alone_as_far_as_bfloat16_goes(make_engine: MakeEngine) -> None:
    together, apart = make_engine("untied", device="cuda"), make_engine("untied", device="cuda")
    first, second = trained(together, "abcd", 5), trained(apart, "abcd", 5, apart=True)
    for name in SPECS:
        np.testing.assert_allclose(first[name], second[name], rtol=2e-2)


def test_deterministic_mode_does_not_see_neighbours(make_engine: MakeEngine) -> None:
    beside, alone = (make_engine("untied", device="cuda", deterministic=True) for _ in range(2))
    first, second = trained(beside, "abcd", 3), trained(alone, "b", 3)
    assert first["b"] == second["b"]
    assert torch.equal(moved(beside, "b"), moved(alone, "b"))


def test_deterministic_mode_gives_the_same_bits_again(make_engine: MakeEngine) -> None:
    """Long sequences, of which flash attention splits the way back among many blocks."""
    found = []
    for _ in range(2):
        engine = make_engine("untied", device="cuda", deterministic=True)
        create(engine, "a", SPECS["a"])
        for number in range(3):
            operation = ForwardBackward(supervised([500, 500, 301, 77], seed=number), "cross_entropy")
            (result,) = engine.forward_backward([RunOperation("a", operation)])
            assert not isinstance(result, Exception), result
            step(engine, "a", learning_rate=1e-3)
        found.append(moved(engine, "a"))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_waits_for_the_device_at_its_end_alone(
    make_engine: MakeEngine, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("untied", device="cuda", dtype=dtype)
    trained(engine, "abcd", 2)  # kernels and memory are there
    split = training._split

    def at_the_end(*given: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return split(*given)

    monkeypatch.setattr(training, "_split", at_the_end)
    items = [RunOperation(name, ForwardBackward(supervised(LENGTHS[name]), LOSS[name])) for name in SPECS]
    try:
        torch.cuda.set_sync_debug_mode("error")
        results = engine.forward_backward(items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(isinstance(result, Exception) for result in results), results


def test_layers_that_are_computed_again_apply_their_adapters(make_engine: MakeEngine) -> None:
    whole, again = (
        make_engine("untied", device="cuda"),
        make_engine("untied", device="cuda", checkpointing=True),
    )
    first, second = trained(whole, "abcd"), trained(again, "abcd")
    for name in SPECS:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3)
        assert difference(moved(again, name), moved(whole, name)) < 5e-2


def test_float32_draws_the_tokens_of_the_cpu(make_engine: MakeEngine) -> None:
    found: list[list[list[int]]] = []
    for options in ({}, {"device": "cuda", "dtype": "float32"}):
        engine = make_engine("untied", **options)
        adapters: list[Any] = [None]
        for name in "ab":
            create(engine, name, SPECS[name])
            trained_values = engine.runs[name].adapter.values
            trained_values.add_(
                torch.randn(trained_values.shape, generator=torch.Generator().manual_seed(5)).to(
                    trained_values.device
                ),
                alpha=0.05,
            )
            adapters.append(saved(engine, name, f"{name}-{len(found)}"))
        wanted = [
            request(text(number, 7 + number), temperature=0.0, max_tokens=12, adapter=adapters[number % 3])
            for number in range(9)
        ]
        found.append([numbers(result.sequences[0].tokens).tolist() for result in sample_all(engine, wanted)])
    assert found[0] == found[1]


def test_bfloat16_draws_with_the_log_probs_of_its_own_forward(make_engine: MakeEngine) -> None:
    engine = make_engine("untied", device="cuda")
    adapters = []
    for name in "abc":
        create(engine, name, SPECS[name])
        adapters.append(saved(engine, name, name))
    prompts = [text(number, 9 + number) for number in range(6)]
    wanted = [
        request(prompt, max_tokens=10, adapter=adapters[number % 3]) for number, prompt in enumerate(prompts)
    ]
    for number, (prompt, result) in enumerate(zip(prompts, sample_all(engine, wanted), strict=True)):
        tokens = numbers(result.sequences[0].tokens)
        drawn = numbers(result.sequences[0].logprobs)
        whole = np.concatenate([np.asarray(prompt), tokens])
        scored = sample_all(
            engine, [request(whole, max_tokens=1, prompt_logprobs=True, adapter=adapters[number % 3])]
        )
        assert scored[0].prompt_logprobs is not None
        again = np.asarray(numbers(scored[0].prompt_logprobs), dtype=np.float64)[-len(tokens) :]
        assert np.abs(again - drawn).max() < 0.1


@pytest.mark.parametrize("adapted", [False, True])
def test_recorded_steps_draw_the_tokens_of_others(make_engine: MakeEngine, adapted: bool) -> None:
    """Sequences that begin and end at different times, on the base model or on adapters and the base model in turn."""
    found, recorded = [], []
    for graphs in (True, False):
        engine = make_engine("untied", device="cuda", cuda_graphs=graphs)
        adapters: list[Any] = [None]
        for name in ("a", "b") if adapted else ():
            create(engine, name, SPECS[name])
            values = engine.runs[name].adapter.values
            noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
            values.add_(noise.to(values.device), alpha=0.05)
            adapters.append(saved(engine, name, f"{name}-{graphs}"))
        wanted = [
            request(
                text(number, 5 + 3 * number),
                temperature=0.0,
                max_tokens=20 + 9 * number,
                adapter=adapters[number % len(adapters)],
            )
            for number in range(11)
        ]
        results = sample_all(engine, wanted) + sample_all(engine, wanted[::-1])[::-1]
        found.append([numbers(result.sequences[0].logprobs) for result in results])
        found.append([numbers(result.sequences[0].tokens) for result in results])
        recorded.append(len(engine.decoder.graphs._recorded))
    assert recorded[0] > 0 and recorded[1] == 0
    alike = [np.array_equal(one, other) for one, other in zip(found[1], found[3], strict=True)]
    assert np.mean(alike) > 0.8  # two tokens may be equally good to the last of 16 bits
    for same, ours, theirs in zip(alike, found[0], found[2], strict=True):
        assert not same or np.abs(ours - theirs).max() < 0.1


def test_too_large_a_pass_is_made_smaller_and_goes_on(make_engine: MakeEngine) -> None:
    engine = make_engine("untied", device="cuda")
    create(engine, "a", SPECS["a"])
    data = supervised([400] * 400)
    expected = engine.forward_backward([RunOperation("a", ForwardBackward(data, "cross_entropy"))])[0]
    assert not isinstance(expected, Exception)
    before = engine.budget.tokens
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = engine.forward_backward([RunOperation("a", ForwardBackward(data, "cross_entropy"))])[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not isinstance(found, Exception)
    assert engine.budget.tokens < before
    np.testing.assert_allclose(found.metrics["loss:sum"], expected.metrics["loss:sum"], rtol=1e-2)
