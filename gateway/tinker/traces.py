"""A session's timeline as a trace that https://ui.perfetto.dev opens: what was asked for, when it ran, what came of it.

The form is the Trace Event Format (JSON), which Perfetto reads whatever the file is called. A run's operations are
slices of its track; samples, which overlap, and times of waiting are asynchronous slices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Query, Request, Response

from gateway.auth import Owner
from gateway.errors import NotFound
from gateway.state import Running
from gateway.store.records import Future, Session
from gateway.tinker.routing import topic

router = topic()

_GOOD_FOR_S = 3600.0
_MOST_CALLS = 200_000
_MEDIA_TYPE = "application/json"


@router.get("/sessions/{session_id}/trace_export")
async def export_trace(session_id: str, owner: Owner, gateway: Running, request: Request) -> dict[str, str]:
    """Where the session's trace can be fetched without a key for an hour; it is made when it is fetched."""
    session = await gateway.session(owner, session_id)
    signed = gateway.signed_urls.sign(request, _path(session.session_id), _GOOD_FOR_S)
    return {"status": "ready", "url": signed.url}


@router.get(
    "/sessions/{session_id}/trace",
    response_class=Response,
    responses={200: {"description": "The trace.", "content": {_MEDIA_TYPE: {"schema": {"type": "object"}}}}},
)
async def get_trace(
    session_id: str,
    gateway: Running,
    expires: Annotated[int, Query(ge=0, le=2**53)],
    signature: Annotated[str, Query(max_length=200)],
) -> Response:
    """The trace, for whoever has the signed address; of the newest 200,000 calls where there are more."""
    gateway.signed_urls.check(_path(session_id), expires, signature)
    session = await gateway.store.sessions.get(session_id)
    if session is None:
        raise NotFound(f"there is no session {session_id!r}", param="session_id")
    futures = await gateway.store.futures.of_session(session, limit=_MOST_CALLS)
    content = await asyncio.to_thread(trace_of, session, futures)
    headers = {"Content-Disposition": f'attachment; filename="{session.session_id}.pftrace"'}
    return Response(content, headers=headers, media_type=_MEDIA_TYPE)


def _path(session_id: str) -> str:
    return f"/api/v1/sessions/{session_id}/trace"


def trace_of(session: Session, futures: list[Future]) -> bytes:
    """The trace's bytes; times are microseconds since the epoch."""
    tracks = {name: number for number, name in enumerate(sorted({_track(future) for future in futures}), 1)}
    events: list[dict[str, Any]] = [
        _named("process_name", 0, f"session {session.session_id}"),
        *(_named("thread_name", number, name) for name, number in tracks.items()),
        _moment("session created", session.created_at),
    ]
    if session.finished_at is not None:
        events.append(_moment(f"session finished: {session.finish_reason}", session.finished_at))
    for future in futures:
        events += _slices(future, tracks[_track(future)])
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")).encode()


def _slices(future: Future, track: int) -> Iterator[dict[str, Any]]:
    """Waiting, then running. What has not begun, or has not ended, has no slice for that yet."""
    begun, ended = future.started_at, future.finished_at
    waited_until = begun if begun is not None else ended
    if waited_until is not None:
        yield from _overlapping("waiting", future, track, future.created_at, waited_until)
    if begun is None or ended is None:
        return
    if future.run_id is None:
        yield from _overlapping(future.kind, future, track, begun, ended)
    else:
        start = _microseconds(begun)
        yield {
            **_event("X", future.kind, track, start),
            "dur": _microseconds(ended) - start,
            "args": _told(future),
        }


def _overlapping(
    name: str, future: Future, track: int, begun: float, ended: float
) -> Iterator[dict[str, Any]]:
    common = {"cat": name, "id": future.request_id}
    yield {**_event("b", name, track, _microseconds(begun)), **common, "args": _told(future)}
    yield {**_event("e", name, track, _microseconds(max(begun, ended))), **common}


def _told(future: Future) -> dict[str, Any]:
    args: dict[str, Any] = {
        "request_id": future.request_id,
        "seq_id": future.seq_id,
        "status": future.status,
        "engine": future.engine,
        "attempts": future.attempts,
    }
    return args if future.error is None else {**args, "error": future.error}


def _track(future: Future) -> str:
    return future.run_id or future.sampler_id or "other"


def _event(phase: str, name: str, track: int, at: int) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": 1, "tid": track, "ts": at}


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 1, "tid": track, "args": {"name": name}}


def _moment(name: str, at: float) -> dict[str, Any]:
    return {**_event("i", name, 0, _microseconds(at)), "s": "p"}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
