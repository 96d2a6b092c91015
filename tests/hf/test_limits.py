"""What runs and sampled adapters occupy, by torch's own account, and what happens when there is not room for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.hf import HfEngine
from engines.interface import RunOperation, SampleEnd, UserError
from engines.memory import ADAPTER_SHARE, RUN_SHARE, free_host_bytes
from engines.operations import AdapterRef, LoraSpec, SampleRequest, SampleResult, SaveWeights
from engines.tuning.runs import VECTORS
from tests.hf.conftest import MakeEngine
from tests.hf.material import create, forward_backward, request, sample_all, supervised, text, train

SPECS = [
    LoraSpec(rank=4, seed=1),
    LoraSpec(rank=3, seed=2, train_unembed=False),
    LoraSpec(rank=8, seed=3, train_attn=False),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_run_is_counted_with_all_that_it_will_ever_hold(engine: HfEngine, spec: LoraSpec) -> None:
    create(engine, "run", spec)
    train(engine, supervised([9, 5]), steps=1)
    forward_backward(engine, supervised([9, 5]))
    run = engine.runs["run"]
    assert run.pending is not None and run.spare is None
    held = [run.adapter.values, run.pending.values, run.optimizer.exp_avg, run.optimizer.exp_avg_sq]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held if tensor is not None}
    assert sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) == engine.run_bytes(spec)


def test_the_limits_are_told(make_engine: MakeEngine) -> None:
    engine = make_engine(run_memory_bytes=123456, adapter_memory_bytes=4567)
    assert engine.info().run_memory_bytes == 123456
    assert engine.stats()["adapter_memory_bytes"] == 4567


def test_without_limits_a_share_of_what_is_free_is_taken(engine: HfEngine) -> None:
    free = free_host_bytes()
    assert free is not None
    assert engine.info().run_memory_bytes == pytest.approx(free * RUN_SHARE, rel=0.3)
    assert engine.stats()["adapter_memory_bytes"] == pytest.approx(free * ADAPTER_SHARE, rel=0.3)


def library(engine: HfEngine, count: int) -> list[AdapterRef]:
    """Trained adapters of one size in the storage."""
    adapters = []
    for index in range(count):
        create(engine, f"run-{index}", LoraSpec(rank=4, seed=index))
        train(engine, supervised([20, 15], seed=index), steps=2, run_id=f"run-{index}", rate=2e-2)
        [outcome] = engine.save_weights([RunOperation(f"run-{index}", SaveWeights(f"adapters/{index}"))])
        assert not isinstance(outcome, UserError)
        adapters.append(AdapterRef(f"adapter-{index}", f"adapters/{index}"))
    return adapters


def wanted(adapters: list[AdapterRef]) -> list[SampleRequest]:
    """Two samples of each adapter and some of the base model, of several lengths, mixed."""
    return [
        request(text(i, 4 + i), max_tokens=3 + 5 * i % 11, num_samples=1 + i % 3, adapter=adapter)
        for i, adapter in enumerate([*adapters, None, *adapters, None])
    ]


def test_samples_of_more_adapters_than_fit_take_turns(make_engine: MakeEngine) -> None:
    roomy = make_engine(deterministic=True)
    try:
        requests = wanted(library(roomy, 6))
        expected = [sample_all(roomy, [one])[0] for one in requests]
        size = roomy.run_bytes(LoraSpec(rank=4, seed=1)) // VECTORS
        engine = make_engine(deterministic=True, adapter_memory_bytes=2 * size, sample_slots=8)
        for call_id, one in enumerate(requests):
            engine.start_sample(call_id, one, f"party-{call_id % 3}")
        ends = {}
        while engine.sampling:
            for event in engine.advance():
                if isinstance(event, SampleEnd):
                    ends[event.call_id] = event.result
            kept = engine.adapters.memory
            assert kept.used == len(kept) * size <= 2 * size
        assert [ends[call_id] for call_id in range(len(requests))] == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_who_waits_for_an_adapter_is_not_overtaken_for_ever(make_engine: MakeEngine) -> None:
    """Samples of one adapter keep coming; another adapter, for which there is no room meanwhile, has its turn."""
    mine, other = library(make_engine(), 2)
    size = make_engine().run_bytes(LoraSpec(rank=4, seed=1)) // VECTORS
    engine = make_engine(adapter_memory_bytes=size)
    engine.start_sample(0, request(text(0, 5), max_tokens=6, adapter=other), "other")
    engine.advance()
    engine.start_sample(1, request(text(1, 5), max_tokens=6, adapter=mine), "me")
    ended: set[int] = set()
    call_id = 2
    while 1 not in ended:
        engine.start_sample(call_id, request(text(call_id, 5), max_tokens=6, adapter=other), "other")
        call_id += 1
        ended |= {event.call_id for event in engine.advance() if isinstance(event, SampleEnd)}
        assert call_id < 40, "the sample never began"


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_sample_lets_its_adapter_go(make_engine: MakeEngine, begun: bool) -> None:
    first, second = library(make_engine(), 2)
    size = make_engine().run_bytes(LoraSpec(rank=4, seed=1)) // VECTORS
    engine = make_engine(adapter_memory_bytes=size)
    engine.start_sample(0, request(text(0, 5), max_tokens=50, num_samples=3, adapter=first))
    if begun:
        engine.advance()
    engine.cancel_sample(0)
    result = sample_all(engine, [request(text(1, 5), adapter=second)])[0]
    assert result == sample_all(make_engine(), [request(text(1, 5), adapter=second)])[0]


def test_a_pass_that_breaks_lets_its_adapters_go(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = library(make_engine(), 2)
    size = make_engine().run_bytes(LoraSpec(rank=4, seed=1)) // VECTORS
    engine = make_engine(adapter_memory_bytes=size)
    engine.start_sample(0, request(text(0, 5), adapter=first))
    with monkeypatch.context() as patch:
        patch.setattr(engine.base, "hidden", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.advance()
    engine.cancel_sample(0)
    assert isinstance(sample_all(engine, [request(text(1, 5), adapter=second)])[0], SampleResult)


def test_an_adapter_that_is_too_large_for_the_engine_is_refused(make_engine: MakeEngine) -> None:
    [adapter] = library(make_engine(), 1)
    engine = make_engine(adapter_memory_bytes=1000)
    with pytest.raises(UserError, match=r"may take 1000 \(adapter_memory_bytes\)"):
        engine.start_sample(0, request(text(0, 5), adapter=adapter))
    assert not engine.sampling


def test_an_adapter_that_cannot_be_read_fails_its_sample_alone(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    first, second = library(make_engine(), 2)
    engine = make_engine()
    (tmp_path / "storage" / first.folder / "adapter_model.safetensors").write_bytes(b"damaged")
    engine.start_sample(0, request(text(0, 5), adapter=first))
    engine.start_sample(1, request(text(0, 5), adapter=second))
    ends: dict[int, SampleResult | Exception] = {}
    while engine.sampling:
        ends |= {event.call_id: event.result for event in engine.advance() if isinstance(event, SampleEnd)}
    assert isinstance(ends[0], UserError) and "adapter_model.safetensors" in str(ends[0])
    assert isinstance(ends[1], SampleResult)
