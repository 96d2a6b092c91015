"""From counters and intervals to the hourly events of the wire. Pure arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.store.records import Interval, UsageRow
from gateway.tinker.edge import moment
from gateway.tokens import owner_urn

_HOUR = 3600
_GIGABYTE = 10**9

_Group = tuple[str, str, str | None]
"""Owner, base model, project."""


def events_of(
    rows: Sequence[UsageRow], intervals: Sequence[Interval], start: int, end: int, now: float
) -> list[dict[str, Any]]:
    """Events of the hours from `start` to before `end`, in order of the hours, the most tokens first.

    `free` of storage is left out: its default is what it would be, and SDKs 0.23 to 0.30 refuse to read it.
    """
    events = [event for row in rows for event in _of_row(row)]
    hours = storage_hours(intervals, start, min(end, now))
    for (owner, base_model, project_id), by_hour in hours.items():
        for bucket, gigabyte_hours in by_hour.items():
            info = {"type": "storage", "gigabyte_hours": gigabyte_hours}
            events.append(_event(bucket, owner, base_model, "", project_id, info))
    return sorted(
        events, key=lambda event: (event["bucket_start"], -event["event_info"].get("token_count", 0))
    )


def _of_row(row: UsageRow) -> Iterator[dict[str, Any]]:
    infos: list[tuple[int, dict[str, Any]]] = [
        (row.training_tokens, {"type": "training", "token_count": row.training_tokens}),
        (
            row.prefill_tokens,
            {"type": "sampling_prefill", "cached": False, "token_count": row.prefill_tokens},
        ),
        (row.cached_tokens, {"type": "sampling_prefill", "cached": True, "token_count": row.cached_tokens}),
        (row.sampled_tokens, {"type": "sampling_sample", "token_count": row.sampled_tokens}),
        (row.checkpoints, {"type": "checkpoint", "count": row.checkpoints}),
    ]
    for amount, info in infos:
        if amount:
            yield _event(row.bucket, row.owner, row.base_model, row.session_id, row.project_id, info)


def _event(
    bucket: int, owner: str, base_model: str, session_id: str, project_id: str | None, info: dict[str, Any]
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "bucket_start": moment(bucket),
        "bucket_end": moment(bucket + _HOUR),
        "base_model": base_model,
        "user_id": owner_urn(owner),
        "user_name": owner,
        "event_info": info,
    }
    if session_id:
        event["session_id"] = session_id
    if project_id is not None:
        event["project_id"] = project_id
    return event


def storage_hours(intervals: Sequence[Interval], start: int, end: float) -> dict[_Group, dict[int, float]]:
    """Gigabyte-hours of each group in each hour that begins between `start`, a full hour, and `end`.

    The integral of stored bytes over time: an hour that an interval covers has its size, the hours at its ends their
    share. Hours in the middle are added up from the changes at both ends, so that the work is that of the intervals
    plus that of the hours, not of their product.
    """
    parts: dict[_Group, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    changes: dict[_Group, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for interval in intervals:
        group = (interval.owner, interval.base_model, interval.project_id)
        since = max(interval.since, float(start))
        until = min(interval.until if interval.until is not None else end, end)
        if until <= since:
            continue
        first, last = int(since // _HOUR) * _HOUR, int(until // _HOUR) * _HOUR
        size = interval.size_bytes / _GIGABYTE
        if first == last:
            parts[group][first] += size * (until - since) / _HOUR
            continue
        parts[group][first] += size * (first + _HOUR - since) / _HOUR
        parts[group][last] += size * (until - last) / _HOUR
        changes[group][first + _HOUR] += size
        changes[group][last] -= size
    return {group: _summed(parts[group], changes[group], start, end) for group in parts}


def _summed(parts: dict[int, float], changes: dict[int, float], start: int, end: float) -> dict[int, float]:
    hours: dict[int, float] = {}
    whole = 0.0
    bucket = start
    while bucket < end:
        whole += changes.get(bucket, 0.0)
        amount = whole + parts.get(bucket, 0.0)
        if amount > 1e-15:
            hours[bucket] = amount
        bucket += _HOUR
    return hours
