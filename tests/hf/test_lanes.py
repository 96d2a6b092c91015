"""Operations of different runs that are computed side by side, each lane with threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engines.hf import HfEngine
from engines.hf.threads import MOST_LANES, WORTH_SHARING, Threads
from engines.interface import RunOperation, UserError
from engines.operations import Forward, ForwardBackward, ForwardResult, LoraSpec
from engines.tuning.lora import Routing, Segment
from tests.hf.conftest import MakeEngine
from tests.hf.material import create, difference, forward, forward_backward, supervised

NAMES = [str(number) for number in range(6)]
LENGTHS = [[21, 9], [30], [13, 17], [29], [30], [31]]


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(2)
    yield made
    made.close()


class Crowd:
    """An engine that finds every pass worth sharing, with six runs. Remembers of each pass the kind of thread that
    computed it, how many it used, and its rows; pass number `lacks_at` lacks memory."""

    def __init__(self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        monkeypatch.setattr("engines.hf.threads.WORTH_SHARING", 1)
        self.engine = make_engine(threads=2, **options)
        self.used: list[tuple[str, int]] = []
        self.rows: list[int] = []
        self.lacks_at: int | None = None
        for number, name in enumerate(NAMES):
            create(self.engine, name, LoraSpec(rank=2 + number, seed=number))
        hidden = self.engine.base.hidden

        def seen(*given: Any) -> torch.Tensor:
            self.used.append((threading.current_thread().name.partition("_")[0], torch.get_num_threads()))
            self.rows.append(given[0].tokens.numel())
            if len(self.used) == self.lacks_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return hidden(*given)

        monkeypatch.setattr(self.engine.base, "hidden", seen)

    def train(self, **replaced: ForwardBackward) -> list[ForwardResult | UserError]:
        items = [RunOperation(name, replaced.get(f"run{name}", operation(int(name)))) for name in NAMES]
        return self.engine.forward_backward(items)


def operation(number: int) -> ForwardBackward:
    return ForwardBackward(supervised(LENGTHS[number], seed=number), "cross_entropy")


def gradient(engine: HfEngine, name: str) -> torch.Tensor:
    pending = engine.runs[name].pending
    assert pending is not None
    return pending.values


@pytest.fixture
def crowd(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    made = Crowd(make_engine, monkeypatch)
    yield made
    made.engine.close()


@pytest.fixture
def alone(make_engine: MakeEngine) -> HfEngine:
    """The same runs, each in a call of its own."""
    engine = make_engine()
    for number, name in enumerate(NAMES):
        create(engine, name, LoraSpec(rank=2 + number, seed=number))
        forward_backward(engine, operation(number).data, run_id=name)
    return engine


@pytest.mark.parametrize(
    ("limit", "sizes", "expected"),
    [
        (2, [100, 100], [[0], [1]]),
        (2, [60, 10, 50, 20], [[0, 1], [2, 3]]),
        (4, [50, 50], [[0], [1]]),
        (4, [50] * 4, [[0], [1], [2], [3]]),
        (1, [100, 100], [[0, 1]]),
        (2, [200], [[0]]),
        (2, [120, 90], [[0, 1]]),  # the second lane would wait
        (3, [90, 80, 20], [[0], [1, 2]]),
        (2, [5, 5], [[0, 1]]),  # too little to do
    ],
)
def test_lanes_are_even_or_one(limit: int, sizes: list[int], expected: list[list[int]]) -> None:
    assert Threads(limit).lanes(WORTH_SHARING // 40, sizes) == expected


def test_there_are_no_more_lanes_than_python_serves() -> None:
    lanes = Threads(64).lanes(WORTH_SHARING, [10] * 64)
    assert len(lanes) == MOST_LANES
    assert sorted(position for lane in lanes for position in lane) == list(range(64))


def test_works_run_at_the_same_time_each_with_its_part_of_the_threads(threads: Threads) -> None:
    meeting = threading.Barrier(2)

    def work() -> tuple[int, int]:
        meeting.wait(30)  # raises unless both are there
        threads.share(WORTH_SHARING, 1)
        return threading.get_ident(), torch.get_num_threads()

    threads.share_all()
    (one, its), (other, others) = threads.side_by_side([work, work])
    assert one != other
    assert (its, others) == (1, 1)
    assert torch.get_num_threads() == 2
    assert threads.side_by_side([work_alone]) == [threading.get_ident()]


def work_alone() -> int:
    return threading.get_ident()


def test_an_error_comes_when_all_have_ended(threads: Threads) -> None:
    failed, ended = threading.Event(), threading.Event()

    def failing() -> None:
        failed.set()
        raise MemoryError("none left")

    def slow() -> None:
        assert failed.wait(30)
        ended.set()

    with pytest.raises(MemoryError, match="none left"):
        threads.side_by_side([failing, slow])
    assert ended.is_set()


def test_a_thread_sees_the_segments_of_its_own_pass_alone() -> None:
    routing = Routing()
    seen: list[Any] = []
    mine = Segment(adapter=None, start=0, stop=1)  # type: ignore[arg-type]
    with routing.along([mine]):
        other = threading.Thread(target=lambda: seen.append(routing.segments))
        other.start()
        other.join(30)
        assert routing.segments == [mine]
    assert seen == [()]


def test_lanes_give_each_run_what_it_gets_alone(crowd: Crowd, alone: HfEngine) -> None:
    outcomes = crowd.train()
    assert crowd.used == [("lane", 1)] * 2
    for number, (name, outcome) in enumerate(zip(NAMES, outcomes, strict=True)):
        assert isinstance(outcome, ForwardResult)
        expected = forward(alone, operation(number).data, run_id=name)
        assert outcome.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6, abs=1e-6)
        assert difference(gradient(crowd.engine, name), gradient(alone, name)) <= 1e-5


def test_forward_in_lanes_gives_the_same_and_changes_nothing(crowd: Crowd, alone: HfEngine) -> None:
    items = [RunOperation(name, Forward(operation(int(name)).data, "cross_entropy")) for name in NAMES]
    outcomes = crowd.engine.forward(items)
    assert crowd.used == [("lane", 1)] * 2
    for number, (name, outcome) in enumerate(zip(NAMES, outcomes, strict=True)):
        assert isinstance(outcome, ForwardResult)
        expected = forward(alone, operation(number).data, run_id=name)
        assert outcome.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6, abs=1e-6)
        assert crowd.engine.runs[name].pending is None


def test_an_operation_that_fails_in_its_lane_fails_alone(crowd: Crowd, alone: HfEngine) -> None:
    bad = operation(2)
    weights = bad.data[0].loss_inputs["weights"].array()
    weights = weights.copy()
    weights[0] = float("inf")
    bad.data[0].loss_inputs["weights"] = type(bad.data[0].loss_inputs["weights"]).of(weights)
    outcomes = crowd.train(run2=bad)
    assert isinstance(outcomes[2], UserError)
    assert crowd.engine.runs["2"].pending is None
    for name in ("0", "1", "3", "4", "5"):
        assert difference(gradient(crowd.engine, name), gradient(alone, name)) <= 1e-5


def test_what_lacks_memory_in_one_lane_is_done_once_in_all(crowd: Crowd, alone: HfEngine) -> None:
    """The other lane has computed everything by then; nothing of it is counted twice."""
    crowd.lacks_at = 2
    outcomes = crowd.train()
    assert len(crowd.used) > 2
    for name, outcome in zip(NAMES, outcomes, strict=True):
        assert isinstance(outcome, ForwardResult)
        assert difference(gradient(crowd.engine, name), gradient(alone, name)) <= 1e-5


def test_a_deterministic_engine_has_one_lane(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many lanes there are follows from the neighbours, and the threads of a pass from that."""
    crowd = Crowd(make_engine, monkeypatch, deterministic=True)
    crowd.train()
    assert crowd.used == [("MainThread", 2)] * len(NAMES)


def test_lanes_share_the_tokens_of_a_pass(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(make_engine, monkeypatch, pass_tokens=64)
    crowd.train()
    assert sum(crowd.rows) == sum(map(sum, LENGTHS))
    assert max(crowd.rows) <= 32
    crowd.engine.close()
