"""Measuring in turn, and what becomes of the numbers."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import alternating
from benchmarks.alternating import Side, Turn, alternate, disturbance, ratios, summary
from benchmarks.plain import PlainProcess
from benchmarks.workload import prompts, training_batches

BUSY_S = 0.1


def busy() -> float:
    """Use some processor time."""
    end = time.process_time() + BUSY_S
    while time.process_time() < end:
        pass
    return 1.0


def test_sides_take_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return float(len(order))

    sides = {"a": Side(lambda: note("a"), {}), "b": Side(lambda: note("b"), {})}
    rounds = alternate(sides, 3, patience_s=0.0)
    assert order == ["a", "b"] * 4
    assert [(done["a"].rate, done["b"].rate) for done in rounds] == [(3.0, 4.0), (5.0, 6.0), (7.0, 8.0)]


def test_processor_time_is_of_the_named_process_and_by_unit() -> None:
    rounds = alternate({"one": Side(busy, {"me": os.getpid(), "init": 1})}, 1, patience_s=0.0)
    spent = summary([done["one"] for done in rounds], units=10)["cpu_ms"]
    assert isinstance(spent, dict)
    assert 8 <= spent["me"] <= 20
    assert spent["init"] < 5


def test_what_the_measured_processes_do_is_no_disturbance_and_what_others_do_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = {"machine": 0.0, "ours": 0.0}
    monkeypatch.setattr(alternating, "busy_seconds", lambda: used["machine"])
    monkeypatch.setattr(alternating, "processor_seconds", lambda pid: used["ours"])

    def work_beside_others() -> float:
        used["ours"] += 1000.0
        used["machine"] += 1000.0 + 0.05 * (os.cpu_count() or 1)
        time.sleep(0.1)
        return 1.0

    (done,) = alternate({"one": Side(work_beside_others, {"me": 1})}, 1, patience_s=0.0)
    assert done["one"].spent == {"me": 1000.0}
    assert 0.1 < done["one"].others <= 0.5


def test_disturbed_rounds_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.0, 0.9, 0.3, 0.01, 0.4, 0.02])
    turns = (Turn(float(i), {}, share) for i, share in enumerate(shares))
    monkeypatch.setattr(alternating, "_turn", lambda side, own: next(turns))
    monkeypatch.setattr(alternating, "_await_calm", lambda deadline: None)
    rounds = alternate({"one": Side(lambda: 0.0, {})}, 3, patience_s=60.0)
    assert [done["one"].rate for done in rounds] == [0.0, 3.0, 5.0]
    assert disturbance(rounds) == [0.0, 0.01, 0.02]


def test_the_least_disturbed_are_taken_when_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    turns = (Turn(float(i), {}, share) for i, share in enumerate([0.5, 0.9, 0.3, 0.8, 0.4, 0.7]))
    monkeypatch.setattr(alternating, "_turn", lambda side, own: next(turns))
    monkeypatch.setattr(alternating, "_await_calm", lambda deadline: None)
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    rounds = alternate({"one": Side(lambda: 0.0, {})}, 3, patience_s=3.5)
    assert [done["one"].rate for done in rounds] == [0.0, 2.0, 4.0]


def test_ratios_are_of_the_two_turns_of_a_round() -> None:
    rounds = [
        {"ours": Turn(2.0, {}, 0.0), "theirs": Turn(4.0, {}, 0.0)},
        {"ours": Turn(3.0, {}, 0.0), "theirs": Turn(1.0, {}, 0.0)},
    ]
    assert ratios(rounds, "ours", "theirs") == [0.5, 3.0]


def test_prompts_are_spread_over_the_lengths() -> None:
    made = prompts(100, 16, 16, 64)
    lengths = sorted(map(len, made))
    assert (len(made), lengths[0], lengths[-1]) == (16, 16, 64)
    assert max(later - earlier for earlier, later in pairwise(lengths)) <= 4
    assert all(0 <= token < 100 for prompt in made for token in prompt)
    assert made == prompts(100, 16, 16, 64)


def test_targets_are_the_next_tokens() -> None:
    for batch in training_batches(50, 2, 3, 8):
        assert batch.inputs.shape == batch.targets.shape == (3, 8)
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()


def test_the_plain_process_says_that_it_broke(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        PlainProcess("train", tmp_path / "missing", {"threads": 1, "rank": 4, "seed": 0})
