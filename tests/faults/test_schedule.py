"""Pauses as clients see them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import schedule
from tests.faults.schedule import SEVERAL, Happened, Schedule, Stuck, pauses, table
from tests.faults.workload import CLIENTS, Journal


class Written(Journal):
    """A journal with times of a test's own, those of client 0."""

    def __init__(self, times: list[float]) -> None:
        super().__init__()
        self._times[0] = times


def test_a_pause_is_the_longest_time_without_a_result_around_a_fault() -> None:
    journal = Written([1.0, 1.1, 1.2, 4.2, 4.3, 4.4, 9.0, 9.1])
    first, second = Happened("killed", 1.15, 1.3), Happened("cut", 4.35, 4.36)
    found = pauses([first, second], journal)
    assert found["killed"] == pytest.approx([3.0])
    assert found["cut"] == pytest.approx([4.6])


def test_a_pause_that_faults_share_counts_once_and_for_none_of_them() -> None:
    journal = Written([1.0, 1.1, 7.1, 7.2])
    found = pauses([Happened("killed", 1.2, 1.3), Happened("cut", 5.0, 5.1)], journal)
    assert list(found) == [SEVERAL]
    assert found[SEVERAL] == pytest.approx([6.0])


def test_results_that_go_on_are_no_pause() -> None:
    journal = Written([0.1 * n for n in range(100)])
    assert pauses([Happened("cut", 5.0, 5.01)], journal)["cut"] == pytest.approx([0.1])


def test_a_client_without_results_counts_for_nothing() -> None:
    assert pauses([Happened("cut", 5.0, 5.1)], Journal()) == {}
    assert CLIENTS == 8


def test_the_table_has_a_line_for_each_kind() -> None:
    happened = [Happened("cut", 1.0, 1.1), Happened("cut", 2.0, 2.1), Happened("killed", 3.0, 3.1)]
    lines = table({"cut": [0.5, 1.5, 1.0], "killed": [2.0]}, happened)
    assert [line.split() for line in lines[1:]] == [
        ["cut", "2", "1.00", "s", "1.50", "s"],
        ["killed", "1", "2.00", "s", "2.00", "s"],
        [*SEVERAL.split(), "-", "-"],
    ]


def scheduled(tmp_path: Path, journal: Journal, order: list[str]) -> Schedule:
    def noted(name: str) -> Any:
        def happen(scene: Any, draw: random.Random) -> bool:
            order.append(name)
            journal.note(0)
            return True

        return happen

    scene: Any = SimpleNamespace(kind=SimpleNamespace(name="somewhere"))
    faults = {name: noted(name) for name in ("a", "b", "c")}
    return Schedule(scene, faults, 7, journal, tmp_path / "log")


def test_the_same_seed_gives_the_same_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_LONGEST_REST_S", 0.0)
    monkeypatch.setattr(Schedule, "_await_results", lambda self, since, clients: None)
    orders: list[list[str]] = [[], []]
    for order in orders:
        scheduled(tmp_path, Journal(), order).run(30, float("inf"), lambda line: None)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 30
    assert len((tmp_path / "log").read_text().splitlines()) == 60


def test_clients_that_get_nothing_any_more_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_RECOVERED_WITHIN_S", 0.05)
    with pytest.raises(Stuck, match=r"only [01] of 8 clients"):
        scheduled(tmp_path, Journal(), []).run(100, float("inf"), lambda line: None)
