"""What engine processes are given of an environment, and what they set in their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines.environment import for_engine, set_defaults, variable

ROOT = str(Path(__file__).parents[2])


def test_an_engine_finds_this_tree_before_what_was_there() -> None:
    assert for_engine({"PYTHONPATH": "/a", "X": "1"}) == {
        "PYTHONPATH": f"{ROOT}{os.pathsep}/a",
        "X": "1",
        "GOMP_SPINCOUNT": "500",
    }
    assert for_engine({})["PYTHONPATH"] == ROOT


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_left_to_whoever_has_chosen(chosen: dict[str, str]) -> None:
    assert {k: v for k, v in for_engine(chosen).items() if k != "PYTHONPATH"} == chosen


def test_defaults_are_set_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTED_SET", "old")
    monkeypatch.setenv("TESTED_UNSET", "")  # so that it is as before when the test is over
    monkeypatch.delenv("TESTED_UNSET")
    set_defaults({"TESTED_SET": "new", "TESTED_UNSET": "new"})
    assert (variable("TESTED_SET"), variable("TESTED_UNSET"), variable("TESTED_OTHER")) == ("old", "new", "")
