"""Training calls and decoding steps share an engine's time, whatever one of either takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from engines import host
from engines.fake import FakeEngine
from engines.interface import EngineConfig, RunOperation, SampleEvent, UserError
from engines.messages import Perform, Performed, RunAddress, Sample, Stop, pack, unpack_from_engine
from engines.operations import ForwardBackward, ForwardResult, encode
from engines.vitals import Vitals
from tests.engines.material import CREATE, learn, sample

CALLS = 40


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class TimedEngine(FakeEngine):
    """Takes as long as a test says, and writes down what it did: `c` a training call, `s` a decoding step."""

    clock: Clock
    call_s = 0.0
    step_s = 0.0
    history = ""

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        self.history += "c"
        self.clock.now += self.call_s
        return super().forward_backward(items)

    def advance(self) -> list[SampleEvent]:
        self.history += "s"
        self.clock.now += self.step_s
        return super().advance()


class Script:
    """A socket on which everything has arrived already, or from the calls only the next one, some polls after the last
    one's answer; a stop follows when all calls are answered."""

    def __init__(self, first: Sequence[list[bytes]], calls: Sequence[list[bytes]], polls: int | None) -> None:
        self.arrived = deque(first)
        self.calls = deque(calls)
        self.polls = polls
        self.answered = 0
        self.sent = 1
        self.quiet = 0

    def poll(self, timeout_ms: int) -> int:
        if self.polls is None:
            self._send(len(self.calls))
        elif self.sent == self.answered:
            self.quiet += 1
            if self.quiet > self.polls:
                self._send(1)
        return len(self.arrived) or int(self.answered > CALLS)

    def _send(self, count: int) -> None:
        self.quiet = 0
        for _ in range(min(count, len(self.calls))):
            self.arrived.append(self.calls.popleft())
            self.sent += 1

    def recv_multipart(self) -> list[bytes]:
        return self.arrived.popleft() if self.arrived else pack(Stop())

    def send_multipart(self, frames: list[bytes]) -> None:
        self.answered += isinstance(unpack_from_engine(frames)[0], Performed)


def history(
    monkeypatch: pytest.MonkeyPatch,
    storage: Path,
    call_s: float,
    step_s: float,
    *,
    max_tokens: int = 4000,
    share: float = 0.5,
    polls: int | None = None,
) -> str:
    """What an engine does that has 40 calls waiting and one sample; with `polls` the calls come one at a time."""
    config = EngineConfig(
        name="timed",
        plugin="fake",
        base_model="test/bytes",
        model="",
        roles=("train", "sample"),
        storage=str(storage),
        epoch=1,
        owner_timeout_s=1e6,
        sampling_share=share,
    )
    engine = TimedEngine.load(config)
    assert isinstance(engine, TimedEngine)
    engine.clock, engine.call_s, engine.step_s = Clock(), call_s, step_s
    monkeypatch.setattr(host, "time", engine.clock)
    create = pack(Perform(0, 1, "create_run", [RunAddress("a", 0)]), encode(CREATE))
    drawing = pack(Sample(100), encode(sample(max_tokens=max_tokens)))
    calls = [
        pack(Perform(i, 1, "forward_backward", [RunAddress("a", i)]), encode(learn()))
        for i in range(1, CALLS + 1)
    ]
    socket = cast(host.Socket, Script([create, drawing], calls, polls))
    vitals = Vitals.create()
    assert host.Host(socket, vitals, engine, engine.info(), config).serve() == host.EXIT_STOPPED
    vitals.close()
    assert engine.history.count("c") == CALLS
    return engine.history


def test_equal_pieces_alternate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert history(monkeypatch, tmp_path, 0.5, 0.5).strip("s") == "cs" * (CALLS - 1) + "c"


def test_a_long_call_is_followed_by_as_many_steps_as_take_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert history(monkeypatch, tmp_path, 1.0, 0.125).strip("s") == ("c" + "s" * 8) * (CALLS - 1) + "c"


def test_a_long_step_is_followed_by_as_many_calls_as_take_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds = history(monkeypatch, tmp_path, 0.125, 1.0).strip("s").split("s")
    assert {len(calls) for calls in rounds[1:-1]} == {8}


def test_after_the_last_sample_training_has_all_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert history(monkeypatch, tmp_path, 1.0, 0.5, max_tokens=3) == "cssc" + "s" + "c" * (CALLS - 2)


@pytest.mark.parametrize(("share", "steps"), [(0.75, 24), (0.5, 8)])
@pytest.mark.parametrize("polls", [None, 0, 3])
def test_sampling_gets_its_share_whether_calls_wait_or_come_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, polls: int | None, share: float, steps: int
) -> None:
    """A call takes a second, a step an eighth. An owner that sends a call only when it has the answer to the one before
    has no more of the time than one whose calls all wait."""
    found = history(monkeypatch, tmp_path, 1.0, 0.125, share=share, polls=polls)
    assert found.strip("s") == ("c" + "s" * steps) * (CALLS - 1) + "c"


def test_training_that_was_not_there_saves_nothing_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each call comes 50 steps after the last one's answer, is made at once, and only one of them."""
    found = history(monkeypatch, tmp_path, 1.0, 0.125, polls=50)
    assert {len(steps) for steps in found.strip("s").split("c")[1:-1]} == {50}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95])
@pytest.mark.parametrize(("call_s", "step_s"), [(1.0, 0.25), (0.02, 0.5)])
def test_neither_starves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, call_s: float, step_s: float
) -> None:
    """From the first call to the last the time is divided as set, to within what one call and one step take."""
    found = history(monkeypatch, tmp_path, call_s, step_s, share=share)
    found = found[: found.rindex("c") + 1]
    trained, sampled = found.count("c") * call_s, found.count("s") * step_s
    assert abs(share * trained - (1 - share) * sampled) <= share * call_s + (1 - share) * step_s + 1e-9
    assert trained > 0 and sampled > 0
