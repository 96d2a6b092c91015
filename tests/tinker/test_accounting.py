"""Hourly events: each against an integral computed minute by minute."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.store.records import Interval, UsageRow
from gateway.tinker.accounting import events_of, storage_hours

HOUR = 3600
START = 480_000 * HOUR
GROUP = ("ann", "m", None)


def interval(since: float, until: float | None, size: int = 10**9, **changes: object) -> Interval:
    """Minutes after the start."""
    values = {"owner": "ann", "base_model": "m", "project_id": None, **changes}
    return Interval(
        size_bytes=size,
        since=START + 60 * since,
        until=None if until is None else START + 60 * until,
        **values,  # type: ignore[arg-type]
    )


def by_the_minute(intervals: list[Interval], hours: int) -> list[float]:
    """Gigabyte-hours of each hour, with one look at the middle of each minute."""
    moments = START + 60 * (np.arange(60 * hours) + 0.5)
    stored = np.zeros(60 * hours)
    for each in intervals:
        there = (moments >= each.since) & (moments < (each.until or np.inf))
        stored += there * each.size_bytes / 1e9
    return [float(hour.mean()) for hour in stored.reshape(hours, 60)]


@pytest.mark.parametrize(
    "pieces",
    [
        [(10, 25)],
        [(10, 200)],
        [(-500, 90)],
        [(-500, None)],
        [(60, 120)],
        [(0, 300)],
        [(30, 30)],
        [(-20, -10)],
        [(5, 130), (61, None), (-100, 59), (250, 900)],
    ],
)
def test_stored_bytes_are_integrated_over_time(pieces: list[tuple[float, float | None]]) -> None:
    intervals = [interval(*piece, size=10**9 * (index + 1)) for index, piece in enumerate(pieces)]
    found = storage_hours(intervals, START, START + 5 * HOUR).get(GROUP, {})
    assert [found.get(START + hour * HOUR, 0.0) for hour in range(5)] == pytest.approx(
        by_the_minute(intervals, 5), abs=1e-9
    )
    assert all(amount > 0 for amount in found.values())


def test_an_hour_that_is_not_over_counts_as_far_as_it_is() -> None:
    found = storage_hours([interval(0, None)], START, START + 1.5 * HOUR)[GROUP]
    assert found == {START: pytest.approx(1.0), START + HOUR: pytest.approx(0.5)}


def test_random_intervals_agree_with_the_minutes() -> None:
    draw = np.random.default_rng(1)
    intervals = []
    for _ in range(200):
        since = int(draw.integers(-600, 900))
        until = None if draw.random() < 0.2 else since + int(draw.integers(0, 900))
        intervals.append(interval(since, until, size=int(draw.integers(1, 10**12))))
    found = storage_hours(intervals, START, START + 12 * HOUR)[GROUP]
    assert [found.get(START + hour * HOUR, 0.0) for hour in range(12)] == pytest.approx(
        by_the_minute(intervals, 12), rel=1e-9
    )


def test_groups_are_kept_apart() -> None:
    intervals = [interval(0, 60), interval(0, 60, owner="bob"), interval(0, 60, project_id="p")]
    found = storage_hours(intervals, START, START + HOUR)
    assert found.keys() == {GROUP, ("bob", "m", None), ("ann", "m", "p")}


def test_a_row_becomes_an_event_for_each_kind_of_use() -> None:
    row = UsageRow(START, "ann@x", "s1", "m", 5, 40, 30, 20, 2, "p")
    small = UsageRow(START, "bob", "", "m", 0, 0, 0, 1, 0, None)
    later = UsageRow(START + HOUR, "bob", "", "m", 9, 0, 0, 0, 0, None)
    events = events_of([later, small, row], [interval(0, 30)], START, START + 2 * HOUR, START + 9 * HOUR)
    assert [event["event_info"] for event in events] == [
        {"type": "sampling_prefill", "cached": False, "token_count": 40},
        {"type": "sampling_prefill", "cached": True, "token_count": 30},
        {"type": "sampling_sample", "token_count": 20},
        {"type": "training", "token_count": 5},
        {"type": "sampling_sample", "token_count": 1},
        {"type": "checkpoint", "count": 2},
        {"type": "storage", "gigabyte_hours": pytest.approx(0.5)},
        {"type": "training", "token_count": 9},
    ]
    first, last = events[0], events[-1]
    assert (first["session_id"], first["project_id"], first["user_id"]) == ("s1", "p", "tml:user:ann@x")
    assert "session_id" not in last
    assert "project_id" not in last
    assert (last["bucket_start"], last["bucket_end"]) == (
        "2024-10-04T01:00:00+00:00",
        "2024-10-04T02:00:00+00:00",
    )
