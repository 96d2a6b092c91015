"""Finding sessions by what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, String, and_, case, cast, false, func, literal, or_, select

from gateway.store import schema
from gateway.store.dialect import now
from gateway.store.records import Session

S = schema.sessions
C = schema.checkpoints
R = schema.runs
SILENT_S = 300.0
"""Seconds without a heartbeat after which it is not known any more whether a session's client is alive."""
NO_PROJECT = "default"
"""How the wire names the project of sessions that have none."""


@dataclass(frozen=True, slots=True)
class StatusFilter:
    """`active`, `client_finished` with one of `reasons` if there are any, or one that sessions here never have."""

    type: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionSearch:
    """What a session must be; what is None or empty restricts nothing. Given both, `session_id` or `display_name`."""

    owners: tuple[str, ...] | None = None
    session_id: str | None = None
    display_name: str | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    statuses: tuple[StatusFilter, ...] | None = None
    before: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A session, and the checkpoints of its runs that are alive."""

    session: Session
    checkpoints: int
    size_bytes: int


def is_alive(session: Session) -> bool:
    """Whether its client has been heard of lately."""
    return session.finished_at is None and session.heartbeat_at > now() - SILENT_S


def search_sessions(connection: Connection, search: SessionSearch, limit: int) -> list[Found]:
    """At most `limit`, newest first."""
    query = select(S).where(*_conditions(search, connection.dialect.name))
    if search.before is not None:
        created_at, session_id = search.before
        # its own row knows the moment better than the wire, which has microseconds
        moment = func.coalesce(
            select(S.c.created_at).where(S.c.session_id == session_id).scalar_subquery(), created_at
        )
        query = query.where(
            or_(S.c.created_at < moment, and_(S.c.created_at == moment, S.c.session_id < session_id))
        )
    ordered = query.order_by(S.c.created_at.desc(), S.c.session_id.desc()).limit(limit)
    sessions = [Session(**row._mapping) for row in connection.execute(ordered)]
    size = func.coalesce(func.sum(C.c.size_bytes), 0).label("size")
    stored = (
        select(R.c.session_id, func.count().label("checkpoints"), size)
        .join(C, C.c.run_id == R.c.run_id)
        .where(R.c.session_id.in_([session.session_id for session in sessions]))
        .where(C.c.expires_at.is_(None) | (C.c.expires_at > now()))
        .group_by(R.c.session_id)
    )
    counts = {row.session_id: (int(row.checkpoints), int(row.size)) for row in connection.execute(stored)}
    return [Found(session, *counts.get(session.session_id, (0, 0))) for session in sessions]


def _conditions(search: SessionSearch, dialect: str) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if search.owners is not None:
        found.append(S.c.owner.in_(search.owners))
    named = [
        *([S.c.session_id == search.session_id] if search.session_id is not None else []),
        *([_name_has(search.display_name)] if search.display_name is not None else []),
    ]
    if named:
        found.append(or_(*named))
    if search.project_ids is not None:
        found.append(func.coalesce(S.c.project_id, NO_PROJECT).in_(search.project_ids))
    for key, value in search.user_metadata.items():
        found.append(_metadata_has(key, value, dialect))
    if search.statuses is not None:
        found.append(or_(*(_has_status(status) for status in search.statuses)))
    return found


def _metadata_has(key: str, value: str, dialect: str) -> ColumnElement[bool]:
    """Pair by pair: in a path to the value, SQLite could not name every key."""
    if dialect == "sqlite":  # which has numbers for true and false
        pairs = func.json_each(S.c.user_metadata).table_valued("key", "value", "type")
        text: ColumnElement[Any] = case(
            (pairs.c.type.in_(("true", "false", "null")), pairs.c.type), else_=cast(pairs.c.value, String)
        )
    else:
        pairs = func.json_each_text(S.c.user_metadata).table_valued("key", "value")
        text = func.coalesce(pairs.c.value, "null")
    same = and_(pairs.c.key == key, text == value)
    return select(literal(1)).select_from(pairs).where(same).exists()


def _name_has(words: str) -> ColumnElement[bool]:
    lowered = func.lower(S.c.display_name)
    return and_(
        S.c.display_name.is_not(None),
        *(lowered.contains(word.lower(), autoescape=True) for word in words.split()),
    )


def _has_status(status: StatusFilter) -> ColumnElement[bool]:
    match status.type:
        case "active":
            return and_(S.c.finished_at.is_(None), S.c.heartbeat_at > now() - SILENT_S)
        case "client_finished":
            reason: Any = S.c.finish_reason.in_(status.reasons) if status.reasons else True
            return and_(S.c.finished_at.is_not(None), reason)
        case _:
            return false()
