"""What owners have used, by the hour: tokens and saves as counters, stored bytes as intervals.

Counters are raised in the transaction that stores the outcome they are of, so they are as durable and as exact as it:
nothing is counted twice after a crash, and nothing that failed is counted.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import now
from gateway.store.records import Checkpoint, Interval, Usage, UsageRow

U = schema.usage
B = schema.stored_bytes
S = schema.sessions
C = schema.checkpoints
HOUR = 3600
log = logging.getLogger(__name__)
_KEYS = ("bucket", "owner", "session_id", "base_model")
COUNTERS = ("training_tokens", "prefill_tokens", "cached_tokens", "sampled_tokens", "checkpoints")


@dataclass(frozen=True, slots=True)
class StoredNow:
    """Alive checkpoints of an owner in a project."""

    owner: str
    project_id: str | None
    count: int
    size_bytes: int


class UsageStore:
    """The usage of all owners."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_behind(self, usage: Usage) -> None:
        """Count what has no outcome of its own; it goes along with a transaction that comes soon."""
        self._database.write_behind(count_usage, usage).add_done_callback(_told)

    async def rows(self, owner: str | None, start: int, end: int) -> list[UsageRow]:
        """Counters of the hours from `start` to before `end` (seconds since the epoch); owner None: everybody's."""
        query = (
            select(U, S.c.project_id)
            .outerjoin(S, S.c.session_id == U.c.session_id)
            .where(U.c.bucket >= start, U.c.bucket < end)
            .order_by(U.c.bucket, U.c.owner, U.c.session_id, U.c.base_model)
        )
        if owner is not None:
            query = query.where(U.c.owner == owner)
        return [UsageRow(**row._mapping) for row in await self._database.rows(query)]

    async def intervals(self, owner: str | None, start: float, end: float) -> list[Interval]:
        """What was stored for a while between `start` and `end`."""
        gone = func.coalesce(B.c.removed_at, B.c.expires_at)
        query = (
            select(B, S.c.project_id)
            .outerjoin(S, S.c.session_id == B.c.session_id)
            .where(B.c.stored_at < end, gone.is_(None) | (gone > start))
        )
        if owner is not None:
            query = query.where(B.c.owner == owner)
        return [_interval(row) for row in await self._database.rows(query)]

    async def stored_now(self, owner: str | None, project_id: str | None) -> list[StoredNow]:
        """Checkpoints that have not expired, by owner and project; the largest first."""
        runs = schema.runs
        size = func.coalesce(func.sum(C.c.size_bytes), 0).label("size_bytes")
        query = (
            select(C.c.owner, S.c.project_id, func.count().label("checkpoints"), size)
            .join(runs, runs.c.run_id == C.c.run_id)
            .join(S, S.c.session_id == runs.c.session_id)
            .where(C.c.expires_at.is_(None) | (C.c.expires_at > now()))
            .group_by(C.c.owner, S.c.project_id)
            .order_by(size.desc(), C.c.owner)
        )
        if owner is not None:
            query = query.where(C.c.owner == owner)
        if project_id is not None:
            query = query.where(S.c.project_id == project_id)
        rows = await self._database.rows(query)
        return [
            StoredNow(row.owner, row.project_id, int(row.checkpoints), int(row.size_bytes)) for row in rows
        ]


def _told(write: asyncio.Future[None]) -> None:
    """Nobody waits for it, so a count that could not be stored is told to the log."""
    if not write.cancelled() and (error := write.exception()) is not None:
        log.error("what has been used could not be counted: %s", error)


def _interval(row: Row[Any]) -> Interval:
    ends = [moment for moment in (row.removed_at, row.expires_at) if moment is not None]
    return Interval(
        row.owner, row.base_model, row.project_id, row.size_bytes, row.stored_at, min(ends) if ends else None
    )


def session_of_id(run_or_sampler_id: str) -> str:
    """The session that the id of a run or a sampler begins with."""
    return run_or_sampler_id.rsplit(":", 2)[0]


def this_hour() -> int:
    """The first second of the hour that is counted in."""
    return int(now() // HOUR) * HOUR


def count_usage(connection: Connection, used: list[Usage]) -> list[None]:
    """Raise the counters of this hour, those that are alike in one row."""
    bucket = this_hour()
    sums: dict[tuple[str, str, str], dict[str, int]] = {}
    for usage in used:
        counters = sums.setdefault(
            (usage.owner, usage.session_id, usage.base_model), dict.fromkeys(COUNTERS, 0)
        )
        for name in COUNTERS:
            counters[name] += getattr(usage, name)
    rows = [
        {"bucket": bucket, "owner": owner, "session_id": session_id, "base_model": base_model, **counters}
        for (owner, session_id, base_model), counters in sorted(sums.items())
        if any(counters.values())
    ]
    if rows:
        connection.execute(_raise_counters(connection.dialect.name), rows)
    return [None] * len(used)


@functools.cache
def _raise_counters(dialect: str) -> Any:
    """Built once: building a statement costs as much as executing it."""
    make: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
    statement = make(U)
    raised = {name: U.c[name] + statement.excluded[name] for name in COUNTERS}
    return statement.on_conflict_do_update(index_elements=_KEYS, set_=raised)


def count_outcomes(connection: Connection, usages: Iterable[Usage | None]) -> None:
    """The same for what outcomes bring along."""
    used = [usage for usage in usages if usage is not None]
    if used:
        count_usage(connection, used)


def counted(usage: Usage) -> dict[str, Any]:
    """What is counted of one outcome, by column; nothing when all its counters are 0."""
    counters = {name: getattr(usage, name) for name in COUNTERS}
    if not any(counters.values()):
        return {}
    whose = {"owner": usage.owner, "session_id": usage.session_id, "base_model": usage.base_model}
    return whose | counters


def begin_storing(connection: Connection, checkpoint: Checkpoint) -> None:
    """From now on a checkpoint occupies its bytes."""
    session_id = session_of_id(checkpoint.run_id)
    row = {
        "path": checkpoint.path,
        "owner": checkpoint.owner,
        "session_id": session_id,
        "base_model": checkpoint.base_model,
        "size_bytes": checkpoint.size_bytes,
        "stored_at": now(),
        "expires_at": checkpoint.expires_at,
    }
    connection.execute(insert(B), [row])
    count_usage(connection, [Usage(checkpoint.owner, session_id, checkpoint.base_model, checkpoints=1)])


def end_storing(connection: Connection, paths: list[str]) -> None:
    """Checkpoints have been deleted or replaced."""
    connection.execute(
        update(B).where(B.c.path.in_(paths), B.c.removed_at.is_(None)).values(removed_at=literal(now()))
    )


def set_end_of_storing(connection: Connection, path: str, expires_at: float | None) -> None:
    """A checkpoint will expire, or will not."""
    connection.execute(
        update(B).where(B.c.path == path, B.c.removed_at.is_(None)).values(expires_at=expires_at)
    )
