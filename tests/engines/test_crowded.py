"""An engine that has not room for everything: which runs are taken in, and which sampled adapters stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.fake import FakeEngine
from engines.interface import EngineConfig, OutOfMemory, PendingSnapshot, RunOperation, SampleEnd, UserError
from engines.messages import Perform, Performed, Restore, RunAddress, TakeSnapshot
from engines.operations import (
    AdapterRef,
    CreateRun,
    CreateRunResult,
    LoraSpec,
    SampleRequest,
    SampleResult,
    SaveWeights,
    encode,
)
from engines.performing import TrainingCalls
from engines.storage import FolderStorage, checksums
from tests.engines.material import CREATE, STEP, learn, sample


def config_with(storage: Path, **limits: Any) -> EngineConfig:
    return EngineConfig("e", "fake", "m", "", ("train", "sample"), str(storage), 1, **limits)


def engine_with(storage: Path, **limits: Any) -> FakeEngine:
    return FakeEngine.load(config_with(storage, **limits))


def create(calls: TrainingCalls, *run_ids: str, rank: int = 4) -> Performed:
    addresses = [RunAddress(run_id, 0) for run_id in run_ids]
    body = encode(CreateRun(LoraSpec(rank=rank, seed=1)))
    return calls.perform(Perform(1, 1, "create_run", addresses), [body] * len(run_ids))[0]


def crowded(storage: Path, places: int) -> tuple[FakeEngine, TrainingCalls, int]:
    """An engine with room for so many runs of rank 4, and the bytes of one."""
    size = engine_with(storage).run_bytes(LoraSpec(rank=4, seed=1))
    engine = engine_with(storage, run_memory_bytes=places * size)
    return engine, TrainingCalls(engine, engine.info(), config_with(storage)), size


def test_a_run_is_counted_with_all_that_it_will_ever_hold(tmp_path: Path) -> None:
    engine = engine_with(tmp_path)
    engine.create_runs([RunOperation("a", CREATE)])
    for operation in (engine.forward_backward, engine.optim_step, engine.forward_backward):
        body: Any = STEP if operation == engine.optim_step else learn()
        operation([RunOperation("a", body)])
    run = engine._runs["a"]
    held = [run.adapter.values, run.pending, run.optimizer.exp_avg, run.optimizer.exp_avg_sq]
    assert sum(array.nbytes for array in held if array is not None) == engine.run_bytes(CREATE.lora)


def test_what_does_not_fit_beside_the_others_is_told_with_its_size(tmp_path: Path) -> None:
    _, calls, size = crowded(tmp_path, places=2)
    performed = create(calls, "a", "b", "c")
    assert performed.no_room == {"c": size}
    assert performed.lost_runs == []
    assert [outcome.failure is None for outcome in performed.outcomes] == [True, True, False]
    assert [outcome.summary.get("bytes") for outcome in performed.outcomes] == [size, size, None]
    assert calls.stats() == {"run_bytes": 2 * size, "run_memory_bytes": 2 * size}
    calls.drop("a")
    assert create(calls, "c").no_room == {}
    assert calls.stats()["run_bytes"] == 2 * size


def test_what_never_fits_is_its_senders_business(tmp_path: Path) -> None:
    _, calls, size = crowded(tmp_path, places=2)
    [outcome] = create(calls, "a", rank=9).outcomes
    assert outcome.failure is not None and outcome.failure.category == "user"
    assert f"may take {2 * size} (run_memory_bytes)" in outcome.failure.message
    assert "lower lora_config.rank" in outcome.failure.message
    assert calls.stats()["run_bytes"] == 0


def test_a_run_that_could_not_be_created_takes_no_room(tmp_path: Path) -> None:
    _, calls, size = crowded(tmp_path, places=1)
    body = encode(CreateRun(LoraSpec(rank=4, seed=1), folder="not/there"))
    performed, _ = calls.perform(Perform(1, 1, "create_run", [RunAddress("a", 0)]), [body])
    assert performed.outcomes[0].failure is not None
    assert calls.stats()["run_bytes"] == 0
    assert create(calls, "b").no_room == {}
    performed, _ = calls.perform(Perform(2, 1, "create_run", [RunAddress("b", 0)]), [body])
    assert performed.outcomes[0].failure is not None
    assert calls.stats()["run_bytes"] == size  # b is what it was


def test_a_device_that_has_less_than_was_thought_is_told_like_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls, size = crowded(tmp_path, places=3)
    make = engine._create_run

    def short_of_memory(run_id: str, operation: CreateRun) -> CreateRunResult:
        if run_id == "b":
            raise OutOfMemory("no memory left for another run", passing=True)
        return make(run_id, operation)

    monkeypatch.setattr(engine, "_create_run", short_of_memory)
    performed = create(calls, "a", "b", "c")
    assert performed.no_room == {"b": size}
    assert [outcome.failure is None for outcome in performed.outcomes] == [True, False, True]
    assert calls.stats()["run_bytes"] == 2 * size


def test_runs_in_doubt_take_no_room(tmp_path: Path) -> None:
    config = config_with(tmp_path, options={"fail_on_token": ord("!")})
    engine = FakeEngine.load(config)
    calls = TrainingCalls(engine, engine.info(), config)
    create(calls, "a")
    assert calls.stats()["run_bytes"] > 0
    bad = encode(learn("no! no"))
    performed, _ = calls.perform(Perform(2, 1, "forward_backward", [RunAddress("a", 1)]), [bad])
    assert performed.lost_runs == ["a"]
    assert calls.stats()["run_bytes"] == 0


def test_a_snapshot_is_restored_when_there_is_room_for_its_run(tmp_path: Path) -> None:
    _, calls, size = crowded(tmp_path, places=1)
    create(calls, "a")
    taken = calls.snapshot(TakeSnapshot(2, 1, "a", 0, "snapshots/a"))
    assert isinstance(taken, PendingSnapshot)
    with FolderStorage(tmp_path).write("snapshots/a") as folder:
        taken.write(folder)
        sums = checksums(folder)
    calls.drop("a")
    create(calls, "b")
    restore, body = Restore(3, 1, "a", 0, "snapshots/a", sums), encode(CreateRun(LoraSpec(rank=4, seed=1)))
    performed = calls.restore(restore, body)
    assert performed.no_room == {"a": size}
    assert calls.stats()["run_bytes"] == size
    calls.drop("b")
    [outcome] = calls.restore(restore, body).outcomes
    assert (outcome.failure, outcome.summary) == (None, {"bytes": size})
    calls.drop("a")
    (tmp_path / "snapshots/a/adapter_model.safetensors").unlink()
    [outcome] = calls.restore(restore, body).outcomes
    assert outcome.failure is not None and outcome.failure.category == "user"  # it is damaged
    assert calls.stats()["run_bytes"] == 0
    _, small, _ = crowded(tmp_path, places=1)
    [outcome] = small.restore(restore, encode(CreateRun(LoraSpec(rank=9, seed=1)))).outcomes
    assert outcome.failure is not None and outcome.failure.category == "server"  # which is no damage
    assert "run_memory_bytes" in outcome.failure.message


# ---------------------------------------------------------------------------- sampled adapters


def library(engine: FakeEngine, count: int) -> list[SampleRequest]:
    """Requests for so many different adapters of the same size."""
    wanted = []
    for index in range(count):
        run_id = f"run-{index}"
        engine.create_runs([RunOperation(run_id, CreateRun(LoraSpec(rank=4, seed=index)))])
        engine.forward_backward([RunOperation(run_id, learn("hello"))])
        engine.optim_step([RunOperation(run_id, STEP)])
        engine.save_weights([RunOperation(run_id, SaveWeights(f"saved/{index}"))])
        adapter = AdapterRef(f"adapter-{index}", f"saved/{index}")
        wanted.append(sample(max_tokens=4 + index, adapter=adapter))
    return wanted


def drain(engine: FakeEngine, most_bytes: int = 0) -> dict[int, SampleResult | Exception]:
    ends = {}
    while engine.sampling:
        for event in engine.advance():
            if isinstance(event, SampleEnd):
                ends[event.call_id] = event.result
        if most_bytes:
            assert 0 <= engine.stats()["adapter_bytes"] <= most_bytes
    return ends


def test_samples_of_more_adapters_than_fit_take_turns(tmp_path: Path) -> None:
    roomy = engine_with(tmp_path)
    wanted = library(roomy, 7)
    expected = []
    for request in wanted:
        roomy.start_sample(0, request)
        expected.append(drain(roomy)[0])
    size = roomy.run_bytes(LoraSpec(rank=4, seed=1)) // 4
    engine = engine_with(tmp_path, adapter_memory_bytes=2 * size)
    for call_id, request in enumerate(wanted):
        engine.start_sample(call_id, request)
    ends = drain(engine, 2 * size)
    assert [ends[call_id] for call_id in range(7)] == expected
    assert engine.stats()["resident_adapters"] == 2


def test_a_cancelled_sample_lets_its_adapter_go(tmp_path: Path) -> None:
    wanted = library(engine_with(tmp_path), 3)
    size = engine_with(tmp_path).run_bytes(LoraSpec(rank=4, seed=1)) // 4
    engine = engine_with(tmp_path, adapter_memory_bytes=size)
    for call_id, request in enumerate(wanted):
        engine.start_sample(call_id, request)
    engine.advance()
    engine.cancel_sample(0)
    engine.cancel_sample(1)
    assert list(drain(engine)) == [2]


def test_an_adapter_that_is_too_large_for_the_engine_is_refused(tmp_path: Path) -> None:
    [request] = library(engine_with(tmp_path), 1)
    engine = engine_with(tmp_path, adapter_memory_bytes=100)
    with pytest.raises(UserError, match=r"may take 100 \(adapter_memory_bytes\)"):
        engine.start_sample(1, request)
    assert not engine.sampling


def test_an_adapter_that_has_gone_before_its_turn_fails_its_sample_alone(tmp_path: Path) -> None:
    wanted = library(engine_with(tmp_path), 2)
    engine = engine_with(tmp_path)
    for call_id, request in enumerate(wanted):
        engine.start_sample(call_id, request)
    (tmp_path / "saved/0/adapter_model.safetensors").write_bytes(b"damaged")
    ends = drain(engine)
    assert isinstance(ends[0], UserError) and "adapter_model.safetensors" in str(ends[0])
    assert isinstance(ends[1], SampleResult)
