"""Measuring in turn, and what becomes of the numbers."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.alternating import Side, alternate, ratios
from benchmarks.plain import PlainProcess
from benchmarks.workload import prompts, training_batches


def test_sides_take_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return float(len(order))

    first, second = Side(lambda: note("a"), {}), Side(lambda: note("b"), {})
    alternate([first, second], 3)
    assert order == ["a", "b"] * 4
    assert (first.rates, second.rates) == ([3.0, 5.0, 7.0], [4.0, 6.0, 8.0])


def test_processor_time_is_of_the_named_process_and_by_unit() -> None:
    def busy() -> float:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return 1.0

    side = Side(busy, {"me": os.getpid(), "init": 1})
    side.measure()
    spent = side.summary(units=10)["cpu_ms"]
    assert isinstance(spent, dict)
    assert 8 <= spent["me"] <= 20
    assert spent["init"] < 5


def test_ratios_are_of_neighbours() -> None:
    assert ratios([2.0, 3.0], [4.0, 1.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratios([1.0], [1.0, 2.0])


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
