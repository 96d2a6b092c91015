"""What has been done with things that matter: written in the transaction that does it, never changed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import now
from gateway.store.records import AuditEntry, AuditTopic

A = schema.audit
MOST_ENTRIES = 100_000
"""Of one answer; the newest are kept."""


class AuditStore:
    """The entries of all owners."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def between(
        self, owner: str | None, start: float, end: float, topic: AuditTopic | None
    ) -> list[AuditEntry]:
        """From `start` to before `end`, in order; owner None: everybody's; topic None: every one."""
        query = select(A).where(A.c.at >= start, A.c.at < end)
        if owner is not None:
            query = query.where(A.c.owner == owner)
        if topic is not None:
            query = query.where(A.c.topic == topic)
        newest = await self._database.rows(
            query.order_by(A.c.at.desc(), A.c.entry_id.desc()).limit(MOST_ENTRIES)
        )
        return [
            AuditEntry(row.owner, AuditTopic(row.topic), row.event, row.details, row.at)
            for row in reversed(newest)
        ]


def record(connection: Connection, owner: str, topic: AuditTopic, event: str, **details: Any) -> None:
    """Write an entry down. `owner` is whose thing it is about, and who may read the entry."""
    row = {"owner": owner, "topic": topic, "event": event, "details": details, "at": now()}
    connection.execute(insert(A), [row])
