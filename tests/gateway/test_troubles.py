"""Trouble is told when it begins, at growing intervals, and once when it is over."""

from __future__ import annotations

import logging

import pytest

from gateway.troubles import Trouble

LOG = logging.getLogger("gateway.test")


class Clock:
    """Seconds, as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gateway.troubles.time.monotonic", clock)
    return clock


@pytest.fixture
def trouble(clock: Clock, caplog: pytest.LogCaptureFixture) -> Trouble:
    caplog.set_level("INFO", "gateway.test")
    return Trouble(LOG, "well again")


def fail_for(trouble: Trouble, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        trouble.failed("it is away")
        clock.now += 1


def test_an_hour_of_failures_each_second_is_a_dozen_lines(
    trouble: Trouble, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fail_for(trouble, clock, 3600)
    told = [record.message for record in caplog.records]
    assert told[0] == "it is away"
    assert told[1] == "it is away (for 10 s, 11 times)"
    assert told[2] == "it is away (for 30 s, 31 times)"
    assert told[3] == "it is away (for 70 s, 71 times)"
    assert 8 < len(told) < 14
    assert trouble.problem == "it is away"


def test_its_end_is_told_once(trouble: Trouble, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    trouble.succeeded()
    assert caplog.records == []
    fail_for(trouble, clock, 5)
    clock.now += 3
    trouble.succeeded()
    trouble.succeeded()
    assert [record.message for record in caplog.records][1:] == ["well again, after 4 s and 5 failures"]
    assert trouble.problem is None
    trouble.failed("it is away")
    assert caplog.records[-1].message == "it is away"


def test_a_success_among_failures_is_no_end(
    trouble: Trouble, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """What is small finds room on a full disk now and then."""
    for _ in range(9):
        fail_for(trouble, clock, 1)
        trouble.succeeded()
    assert [record.message for record in caplog.records] == ["it is away"]
    trouble.succeeded(surely=True)
    assert trouble.problem is None
    assert len(caplog.records) == 2


def test_what_was_long_ago_is_another_trouble(
    trouble: Trouble, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    trouble.failed("it is away")
    clock.now += 61
    trouble.failed("it is away")
    assert [record.message for record in caplog.records] == ["it is away"] * 2
