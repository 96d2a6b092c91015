"""What the host makes of engines that break in ways the fake one does not by itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import host
from engines.fake import FakeEngine
from engines.interface import EngineConfig, RunOperation, SampleEnd, SampleEvent, SampleStep, Token, UserError
from engines.messages import (
    EXIT_OWNER_GONE,
    FromEngine,
    Hello,
    Load,
    LoadFailed,
    Perform,
    Ping,
    RunAddress,
    Sample,
    Sampled,
    SampleDelta,
    Stop,
    pack,
    unpack_from_engine,
)
from engines.operations import (
    Forward,
    ForwardBackward,
    ForwardResult,
    SaveWeights,
    SaveWeightsResult,
    encode,
)
from engines.performing import TrainingCalls
from engines.sampling_calls import SamplingCalls
from engines.vitals import Heart, Vitals
from tests.engines.material import CREATE, STEP, learn, sample


def config(storage: Path) -> EngineConfig:
    return EngineConfig("tested", "fake", "test/bytes", "", ("train", "sample"), str(storage), epoch=1)


class BrokenEngine(FakeEngine):
    """Breaks where a test says."""

    forgets_a_result = False
    broken_by: Exception | None = None
    breaks_at_steps = False
    keeps_sampling = False
    ends: SampleEvent | None = None
    dropped: tuple[str, ...] = ()

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        results = super().forward_backward(items)
        return results[1:] if self.forgets_a_result else results

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        if self.broken_by is not None:
            raise self.broken_by
        return super().forward(items)

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        if self.broken_by is not None:
            raise self.broken_by
        return super().save_weights(items)

    def drop_run(self, run_id: str) -> None:
        self.dropped += (run_id,)
        super().drop_run(run_id)

    def advance(self) -> list[SampleEvent]:
        if self.breaks_at_steps:
            raise MemoryError("no room for one more token")
        if self.ends is not None:
            return [self.ends]
        step = super().advance
        return [event for _ in range(3) for event in step()]

    @property
    def sampling(self) -> bool:
        return self.keeps_sampling or super().sampling


@pytest.fixture
def engine(tmp_path: Path) -> BrokenEngine:
    loaded = BrokenEngine.load(config(tmp_path))
    assert isinstance(loaded, BrokenEngine)
    return loaded


class Recorder:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[FromEngine] = []

    def __call__(self, message: FromEngine, *payloads: bytes) -> None:
        self.messages.append(message)


# ---------------------------------------------------------------------------- training


def call(kind: Any, *runs: tuple[str, int]) -> Perform:
    return Perform(1, 1, kind, [RunAddress(*run) for run in runs])


def test_a_missing_result_means_that_all_runs_of_the_call_are_in_doubt(engine: BrokenEngine) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0), ("b", 0)), [encode(CREATE)] * 2)
    engine.forgets_a_result = True
    performed, payloads = calls.perform(call("forward_backward", ("a", 1), ("b", 1)), [encode(learn())] * 2)
    assert performed.lost_runs == ["a", "b"]
    assert engine.dropped == ("a", "b")
    assert payloads == []
    assert all(outcome.failure is not None for outcome in performed.outcomes)


@pytest.mark.parametrize(
    ("kind", "operation"),
    [("forward", Forward(learn().data, "cross_entropy")), ("save_weights", SaveWeights("checkpoints/a"))],
)
def test_what_changes_no_run_breaks_without_losing_it(
    engine: BrokenEngine, kind: str, operation: Forward | SaveWeights
) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])
    calls.perform(call("forward_backward", ("a", 1)), [encode(learn())])
    engine.broken_by = RuntimeError("a secret of the engine")
    performed, payloads = calls.perform(call(kind, ("a", 2)), [encode(operation)])
    failure = performed.outcomes[0].failure
    assert failure is not None and failure.category == "server" and failure.error_id
    assert "secret" not in failure.message
    assert (performed.lost_runs, engine.dropped, payloads) == ([], (), [])
    engine.broken_by = None
    performed, payloads = calls.perform(call(kind, ("a", 3)), [encode(operation)])
    assert performed.outcomes[0].failure is None and len(payloads) == 1
    performed, _ = calls.perform(call("optim_step", ("a", 4)), [encode(STEP)])
    assert performed.outcomes[0].summary["grad_norm"] > 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space", "/srv/secret/checkpoints"), "No space left on device"),
        (PermissionError(errno.EROFS, "Read-only", "/srv/secret"), "Read-only file system"),
        (OSError("/srv/secret is gone"), "the operating system refused"),
    ],
)
def test_storage_that_cannot_be_written_to_is_named_but_not_where_it_is(
    engine: BrokenEngine, error: OSError, cause: str
) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])
    engine.broken_by = error
    performed, _ = calls.perform(call("save_weights", ("a", 1)), [encode(SaveWeights("checkpoints/a"))])
    failure = performed.outcomes[0].failure
    assert failure is not None and failure.category == "server" and failure.error_id
    assert f"storage cannot be written to ({cause})" in failure.message
    assert "secret" not in failure.message
    assert performed.lost_runs == []


def test_a_full_disk_loses_no_run(engine: BrokenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the file system itself, through the engine's own saving."""
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        performed, _ = calls.perform(call("save_weights", ("a", 1)), [encode(SaveWeights("checkpoints/a"))])
    failure = performed.outcomes[0].failure
    assert failure is not None and "No space left on device" in failure.message
    performed, _ = calls.perform(call("save_weights", ("a", 2)), [encode(SaveWeights("checkpoints/a"))])
    assert performed.outcomes[0].failure is None


def test_only_the_operation_that_the_call_names_is_performed(engine: BrokenEngine) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])
    performed, _ = calls.perform(call("forward_backward", ("a", 1)), [encode(STEP)])
    failure = performed.outcomes[0].failure
    assert failure is not None and "OptimStep, the call asks for forward_backward" in failure.message


def test_a_call_holds_one_operation_of_a_run(engine: BrokenEngine) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])
    performed, payloads = calls.perform(call("forward_backward", ("a", 1), ("a", 2)), [encode(learn())] * 2)
    first, second = (outcome.failure for outcome in performed.outcomes)
    assert first is None
    assert second is not None and "two operations of run a" in second.message
    assert len(payloads) == 1
    assert performed.lost_runs == []


def test_every_run_needs_its_operation(engine: BrokenEngine) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    with pytest.raises(ValueError, match="zip"):
        calls.perform(call("create_run", ("a", 0), ("b", 0)), [encode(CREATE)])


def test_a_failed_creation_leaves_the_run_as_it_was(engine: BrokenEngine) -> None:
    calls = TrainingCalls(engine, engine.info(), engine._config)
    calls.perform(call("create_run", ("a", 0)), [encode(CREATE)])
    calls.perform(call("forward_backward", ("a", 1)), [encode(learn())])
    missing = encode(type(CREATE)(CREATE.lora, folder="not/there"))
    performed, _ = calls.perform(call("create_run", ("a", 0)), [missing])
    failure = performed.outcomes[0].failure
    assert failure is not None and failure.category == "server"
    assert failure.error_id is not None and "not/there" not in failure.message
    performed, _ = calls.perform(call("optim_step", ("a", 2)), [encode(STEP)])
    assert performed.outcomes[0].summary["grad_norm"] > 0


# ---------------------------------------------------------------------------- sampling


def test_a_step_that_breaks_fails_all_samples_and_the_next_ones_go_on(engine: BrokenEngine) -> None:
    sent = Recorder()
    samples = SamplingCalls(engine, engine.info(), sent)
    samples.start(Sample(1), encode(sample()))
    samples.start(Sample(2, stream=True), encode(sample()))
    engine.breaks_at_steps = True
    samples.advance()
    failures = [message.failure for message in sent.messages if isinstance(message, Sampled)]
    assert len(failures) == len(sent.messages) == 2
    assert failures[0] == failures[1]
    assert failures[0] is not None and failures[0].category == "server" and failures[0].error_id
    assert "no room" not in failures[0].message
    assert not engine.sampling

    engine.breaks_at_steps = False
    samples.start(Sample(3), encode(sample(max_tokens=3)))
    samples.advance()
    assert sent.messages[2:] == [Sampled(3, prompt_tokens=5, sampled_tokens=3)]


def test_an_engine_that_cannot_let_go_of_its_samples_is_given_up(engine: BrokenEngine) -> None:
    samples = SamplingCalls(engine, engine.info(), Recorder())
    samples.start(Sample(1), encode(sample()))
    engine.breaks_at_steps = engine.keeps_sampling = True
    with pytest.raises(RuntimeError, match="only a new process helps"):
        samples.advance()


def test_several_tokens_of_one_step_come_in_one_message(engine: BrokenEngine) -> None:
    sent = Recorder()
    samples = SamplingCalls(engine, engine.info(), sent)
    samples.start(Sample(1, stream=True), encode(sample(num_samples=2, max_tokens=5)))
    samples.advance()
    samples.advance()
    deltas = [message for message in sent.messages if isinstance(message, SampleDelta)]
    assert [(delta.sequence, len(delta.tokens)) for delta in deltas] == [(0, 3), (1, 3), (0, 2), (1, 2)]
    assert [delta.stop_reason for delta in deltas] == [None, None, "length", "length"]
    assert all(delta.top_logprobs == [] for delta in deltas)
    assert sent.messages[-1] == Sampled(1, prompt_tokens=5, sampled_tokens=2 * 5)


def test_a_sample_that_cannot_be_carried_on_is_the_senders_business(engine: BrokenEngine) -> None:
    sent = Recorder()
    samples = SamplingCalls(engine, engine.info(), sent)
    samples.start(Sample(1), encode(sample()))
    engine.ends = SampleEnd(1, UserError("its weights are not finite"))
    samples.advance()
    (ended,) = sent.messages
    assert isinstance(ended, Sampled)
    assert ended.failure is not None and ended.failure.category == "user"
    assert ended.failure.message == "its weights are not finite"


def test_events_of_a_sample_that_is_over_are_ignored(engine: BrokenEngine) -> None:
    sent = Recorder()
    samples = SamplingCalls(engine, engine.info(), sent)
    samples.start(Sample(1, stream=True), encode(sample()))
    samples.cancel(1)
    engine.ends = SampleStep(1, 0, Token(1, -0.5))
    samples.advance()
    engine.ends = SampleEnd(1, UserError("late"))
    samples.advance()
    assert sent.messages == []


# ---------------------------------------------------------------------------- greeting


class Wire:
    """A socket that holds what the owner says, and keeps what it is told."""

    def __init__(self, *said: Any) -> None:
        self.said = [pack(message) for message in said]
        self.told: list[FromEngine] = []

    def poll(self, timeout_ms: int) -> int:
        return len(self.said)

    def recv_multipart(self) -> list[bytes]:
        return self.said.pop(0)

    def send_multipart(self, frames: list[bytes]) -> None:
        self.told.append(unpack_from_engine(frames)[0])


def test_an_unexpected_error_while_loading_is_told_without_its_details(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def explode(plugin: str) -> None:
        raise RuntimeError(f"secret detail of {plugin}")

    monkeypatch.setattr(host, "engine_class", explode)
    monkeypatch.setattr(host, "start_logging", lambda name: None)
    wire = Wire(Ping(), Load(config(tmp_path)))
    assert host.run(wire, Heart(Vitals.create())) == host.EXIT_LOAD_FAILED  # type: ignore[arg-type]
    hello, failed = wire.told
    assert isinstance(hello, Hello)
    assert isinstance(failed, LoadFailed)
    assert "its log says why under" in failed.message
    assert "secret" not in failed.message


def test_stop_instead_of_load_is_a_clean_end() -> None:
    wire = Wire(Stop())
    assert host.run(wire, Heart(Vitals.create())) == host.EXIT_STOPPED  # type: ignore[arg-type]


def test_an_owner_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_GREETING_S", 0.05)
    assert host.run(Wire(), Heart(Vitals.create())) == EXIT_OWNER_GONE  # type: ignore[arg-type]
