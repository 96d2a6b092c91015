"""Sessions, as the REST client and the `tinker` command line list, find and change them."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import Query, Request, Response

from gateway.auth import Caller, Owner, Who
from gateway.errors import NotFound, Unprocessable
from gateway.state import Gateway, Running
from gateway.store.records import Session
from gateway.store.session_search import NO_PROJECT, Found, SessionSearch, StatusFilter, is_alive
from gateway.store.sessions import Assignment
from gateway.tinker import schemas
from gateway.tinker.edge import json_body, json_reply, moment, takes
from gateway.tinker.routing import topic
from gateway.tinker.texts import texts_of
from gateway.tokens import URN, owner_urn

router = topic()

Scope = Annotated[
    Literal["owned", "accessible"], Query(description="accessible: for an admin's key, everybody's")
]

_PAGE = 50
_STATUSES = ("active", "client_finished", "cancelled", "failed")


def whose(caller: Caller, access_scope: str) -> str | None:
    """Whose things a scope is of; None: everybody's."""
    return None if caller.admin and access_scope == "accessible" else caller.owner


@router.get("/sessions")
async def list_sessions(
    caller: Who,
    gateway: Running,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    access_scope: Scope = "owned",
) -> dict[str, list[str]]:
    """Ids of sessions, newest first."""
    owner = whose(caller, access_scope)
    page = await gateway.store.sessions.page(limit=limit, offset=offset, where={"owner": owner})
    return {"sessions": [session.session_id for session in page]}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, caller: Who, gateway: Running, access_scope: Scope = "owned"
) -> dict[str, Any]:
    """The runs and samplers of a session."""
    session = await _session(gateway, session_id, whose(caller, access_scope))
    runs = await gateway.store.runs.of_session(session_id)
    samplers = await gateway.store.samplers.of_session(session_id)
    body: dict[str, Any] = {
        "training_run_ids": [run.run_id for run in runs],
        "sampler_ids": [sampler.sampler_id for sampler in samplers],
        "user_metadata": texts_of(session.user_metadata),
    }
    return body if session.display_name is None else {**body, "display_name": session.display_name}


async def _session(gateway: Gateway, session_id: str, owner: str | None) -> Session:
    session = await gateway.known_sessions.get(session_id)
    if session is None or owner not in (None, session.owner):
        raise NotFound(f"there is no session {session_id!r}", param="session_id")
    return session


@router.put("/sessions/{session_id}/project", openapi_extra=takes(schemas.AssignProject))
async def assign_project(request: Request, session_id: str, owner: Owner, gateway: Running) -> Response:
    """Count a session, and all that it has used, among a project's."""
    body = await json_body(request, schemas.AssignProject)
    await gateway.session(owner, session_id)
    await gateway.store.sessions.assign_project(Assignment(session_id, body.project_id))
    gateway.known_sessions.forget(session_id)
    return json_reply({})


@router.post("/sessions/search", openapi_extra=takes(schemas.SearchSessions))
async def search_sessions(request: Request, caller: Who, gateway: Running) -> Response:
    """Sessions by what is known of them, newest first, a page at a time."""
    body = await json_body(request, schemas.SearchSessions)
    limit = body.limit or _PAGE
    found = await gateway.store.sessions.search(_search_of(body, caller), limit + 1)
    answer: dict[str, Any] = {"sessions": [_summary(each) for each in found[:limit]]}
    if len(found) > limit:
        last = found[limit - 1].session
        answer["next_cursor"] = {
            "last_created_at": moment(last.created_at),
            "last_session_id": last.session_id,
        }
    return json_reply(answer)


def _search_of(body: schemas.SearchSessions, caller: Caller) -> SessionSearch:
    cursor = body.cursor
    return SessionSearch(
        owners=_owners(body.owner, caller),
        session_id=body.session_id,
        display_name=body.display_name,
        project_ids=None if body.project_ids is None else tuple(body.project_ids),
        user_metadata=body.user_metadata or {},
        statuses=None if body.statuses is None else tuple(_status(query) for query in body.statuses),
        before=None if cursor is None else (cursor.last_created_at.timestamp(), cursor.last_session_id),
    )


def _owners(owner: schemas.SearchOwner | None, caller: Caller) -> tuple[str, ...] | None:
    """Whose sessions to look at; None: everybody's. Others' are looked at for an admin only."""
    match owner.type if owner is not None else "own":
        case "own" | None:
            return (caller.owner,)
        case "accessible":
            return None if caller.admin else (caller.owner,)
        case "user" if owner is not None and owner.owner_urns:
            named = [unquote(urn.removeprefix(URN)) for urn in owner.owner_urns if urn.startswith(URN)]
            return tuple(name for name in named if caller.admin or name == caller.owner)
        case other:
            raise Unprocessable(
                f"owner.type is {other[:40]!r}; allowed are own, accessible, and user with owner_urns",
                param="owner",
            )


def _status(query: schemas.StatusQuery) -> StatusFilter:
    if query.type not in _STATUSES:
        raise Unprocessable(
            f"statuses has the type {str(query.type)[:40]!r}; allowed are {', '.join(_STATUSES)}",
            param="statuses",
        )
    return StatusFilter(query.type, tuple(query.reasons or ()))


def _summary(found: Found) -> dict[str, Any]:
    session = found.session
    body: dict[str, Any] = {
        "session_id": session.session_id,
        "created_at": moment(session.created_at),
        "owner": owner_urn(session.owner),
        "project_id": session.project_id or NO_PROJECT,
        "checkpoints_count": found.checkpoints,
        "checkpoint_storage_bytes": found.size_bytes,
        "user_metadata": texts_of(session.user_metadata),
    }
    if session.display_name is not None:
        body["display_name"] = session.display_name
    if session.finished_at is not None:
        body["status"] = {"type": "client_finished", "reason": {"type": session.finish_reason}}
        if session.finish_detail is not None:
            body["status"]["detail"] = session.finish_detail
    elif is_alive(session):
        body["status"] = {"type": "active"}
    return body
