"""Sessions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, select, update

from gateway.store import schema
from gateway.store.audit import record
from gateway.store.database import Database
from gateway.store.dialect import NO_FILTERS, Filters, insert_or_ignore, now
from gateway.store.records import AuditTopic, Session
from gateway.store.session_search import Found, SessionSearch, search_sessions

S = schema.sessions


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a session, as its client put it."""

    session_id: str
    reason: str
    detail: str | None


@dataclass(frozen=True, slots=True)
class Assignment:
    """The project that a session is to belong to."""

    session_id: str
    project_id: str


class SessionStore:
    """The sessions of all owners."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, session: Session) -> Session:
        """Store a session, or return the one that a first try of the same request has stored."""
        return await self._database.write(insert_sessions, session)

    async def get(self, session_id: str) -> Session | None:
        row = await self._database.first(select(S).where(S.c.session_id == session_id))
        return session_of(row) if row is not None else None

    async def of_key(self, owner: str, idempotency_key: str) -> Session | None:
        """The session that a request with this key has created."""
        query = select(S).where(S.c.owner == owner, S.c.idempotency_key == idempotency_key)
        row = await self._database.first(query)
        return session_of(row) if row is not None else None

    async def metadata_of(self, session_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """What the clients of some sessions have said about them."""
        query = select(S.c.session_id, S.c.user_metadata).where(S.c.session_id.in_(session_ids))
        return {row.session_id: row.user_metadata for row in await self._database.rows(query)}

    async def beat(self, session_id: str) -> bool:
        """Its client is alive. Whether the session is: one that has ended stays so."""
        return await self._database.write(touch_sessions, session_id)

    async def search(self, search: SessionSearch, limit: int) -> list[Found]:
        """Sessions by what is known of them, newest first."""
        return await self._database.read(lambda connection: search_sessions(connection, search, limit))

    async def assign_project(self, assignment: Assignment) -> None:
        """From now on, and for what was used before, a session belongs to a project."""
        await self._database.write(_assign_projects, assignment)

    async def finish(self, finish: Finish) -> None:
        """The first finish of a session counts."""
        await self._database.write(finish_sessions, finish)

    async def page(
        self,
        *,
        limit: int,
        before: tuple[float, str] | None = None,
        offset: int = 0,
        where: Filters = NO_FILTERS,
    ) -> list[Session]:
        """Newest first; `where` filters by column; `before` is (created_at, session_id) of the last row seen."""
        query = select(S).order_by(S.c.created_at.desc(), S.c.session_id.desc()).limit(limit).offset(offset)
        for column, value in where.items():
            if value is not None:
                query = query.where(S.c[column] == value)
        if before is not None:
            created_at, session_id = before
            older = (S.c.created_at == created_at) & (S.c.session_id < session_id)
            query = query.where((S.c.created_at < created_at) | older)
        return [session_of(row) for row in await self._database.rows(query)]


def session_of(row: Row[Any]) -> Session:
    """The record of a row."""
    return Session(**row._mapping)


def insert_sessions(connection: Connection, sessions: list[Session]) -> list[Session]:
    """Each session, or the earlier one of the same owner and idempotency key."""
    connection.execute(insert_or_ignore(connection, S), [asdict(session) for session in sessions])
    stored = []
    for session in sessions:
        same = S.c.session_id == session.session_id
        if session.idempotency_key is not None:
            same = (S.c.owner == session.owner) & (S.c.idempotency_key == session.idempotency_key)
        stored.append(session_of(connection.execute(select(S).where(same)).one()))
    return stored


def touch_sessions(connection: Connection, session_ids: list[str]) -> list[bool]:
    alive = S.c.session_id.in_(session_ids) & S.c.finished_at.is_(None)
    change = update(S).where(alive).values(heartbeat_at=now()).returning(S.c.session_id)
    touched = set(connection.execute(change).scalars())
    return [session_id in touched for session_id in session_ids]


def finish_sessions(connection: Connection, finishes: list[Finish]) -> list[None]:
    for finish in finishes:
        connection.execute(
            update(S)
            .where(S.c.session_id == finish.session_id, S.c.finished_at.is_(None))
            .values(finished_at=now(), finish_reason=finish.reason, finish_detail=finish.detail)
        )
    return [None] * len(finishes)


def _assign_projects(connection: Connection, assignments: list[Assignment]) -> list[None]:
    for each in assignments:
        change = update(S).where(S.c.session_id == each.session_id).values(project_id=each.project_id)
        owner = connection.execute(change.returning(S.c.owner)).scalar()
        if owner is not None:
            details = {"session_id": each.session_id, "project_id": each.project_id}
            record(connection, owner, AuditTopic.PROJECTS, "project_session_assigned", **details)
    return [None] * len(assignments)
