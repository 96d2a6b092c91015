"""What the host makes of a lack of memory: whose failure it is, under which id, and that nothing else pays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from engines.fake import FakeEngine
from engines.interface import OutOfMemory, RunOperation, SampleEnd, SampleEvent, UserError
from engines.messages import Failure, FromEngine, Perform, Performed, RunAddress, Sample, Sampled
from engines.operations import ForwardBackward, ForwardResult, OptimStep, OptimStepResult, encode
from engines.performing import TrainingCalls
from engines.sampling_calls import SamplingCalls
from tests.engines.material import CREATE, STEP, learn, sample
from tests.engines.test_calls import config


class TightEngine(FakeEngine):
    """Lacks memory for a run, or altogether, as a test says."""

    lacks: OutOfMemory | None = None
    breaks = False

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        results = super().forward_backward(items)
        return results if self.lacks is None else [self.lacks, *results[1:]]

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        if self.breaks:
            raise MemoryError("in the middle of a step")
        return super().optim_step(items)

    def advance(self) -> list[SampleEvent]:
        assert self.lacks is not None
        return [SampleEnd(7, self.lacks)]


@pytest.fixture
def engine(tmp_path: Path) -> TightEngine:
    loaded = TightEngine.load(config(tmp_path))
    assert isinstance(loaded, TightEngine)
    return loaded


@pytest.fixture
def calls(engine: TightEngine) -> TrainingCalls:
    return TrainingCalls(engine, engine.info(), engine._config)


def performed(calls: TrainingCalls, call: Perform, bodies: list[bytes]) -> Performed:
    return calls.perform(call, bodies)[0]


def begin(calls: TrainingCalls) -> None:
    runs = [RunAddress("a", 0), RunAddress("b", 0)]
    performed(calls, Perform(1, 1, "create_run", runs), [encode(CREATE)] * 2)


def pass_of_both(*, replay: bool = False) -> tuple[Perform, list[bytes]]:
    runs = [RunAddress("a", 1), RunAddress("b", 1)]
    return Perform(2, 1, "forward_backward", runs, replay=replay), [encode(learn())] * 2


@pytest.mark.parametrize(
    ("passing", "replay", "category"),
    [(False, False, "user"), (True, False, "server"), (False, True, "server")],
)
def test_one_operation_fails_with_an_id_that_the_log_has_and_the_other_is_applied(
    engine: TightEngine,
    calls: TrainingCalls,
    caplog: pytest.LogCaptureFixture,
    passing: bool,
    replay: bool,
    category: str,
) -> None:
    begin(calls)
    engine.lacks = OutOfMemory("cpu has no memory left for so much", passing=passing)
    with caplog.at_level(logging.ERROR):
        done = performed(calls, *pass_of_both(replay=replay))
    first, second = (outcome.failure for outcome in done.outcomes)
    assert first is not None
    assert first == Failure(category, "cpu has no memory left for so much", first.error_id)  # type: ignore[arg-type]
    assert f"error {first.error_id}: no memory for forward_backward of a#1" in caplog.text
    assert second is None
    assert done.lost_runs == []  # both are where they were, and nothing has to be restored
    engine.lacks = None
    again = Perform(3, 1, "forward_backward", [RunAddress("a", 2)])
    assert performed(calls, again, [encode(learn())]).outcomes[0].failure is None


def test_when_memory_ends_in_the_middle_of_a_step_the_run_is_in_doubt_and_the_sentence_says_why(
    engine: TightEngine, calls: TrainingCalls
) -> None:
    begin(calls)
    engine.breaks = True
    done = performed(calls, Perform(2, 1, "optim_step", [RunAddress("a", 1)]), [encode(STEP)])
    failure = done.outcomes[0].failure
    assert failure is not None
    assert failure.category == "server"
    assert failure.message.startswith("memory ran out in this operation; send it again later.")
    assert failure.error_id is not None and failure.error_id in failure.message
    assert done.lost_runs == ["a"]


@pytest.mark.parametrize(("passing", "category"), [(True, "server"), (False, "user")])
def test_a_sample_fails_alone(engine: TightEngine, passing: bool, category: str) -> None:
    sent: list[FromEngine] = []
    samples = SamplingCalls(engine, engine.info(), lambda message, *_: sent.append(message))
    for call_id in (7, 8):
        samples.start(Sample(call_id), encode(sample()))
    engine.lacks = OutOfMemory("cpu has no memory left for this sample", passing=passing)
    samples.advance()
    [answer] = sent
    assert isinstance(answer, Sampled) and answer.failure is not None
    assert (answer.call_id, answer.failure.category) == (7, category)
    assert answer.failure.error_id
    assert engine.sampling
