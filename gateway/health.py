"""Liveness and readiness, two questions: does the process answer, and would a request be served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gateway.errors import Forbidden, Unauthorized
from gateway.state import Gateway, gateway_of
from gateway.supervisor import EngineState, Supervisor

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/api/v1/healthz")
async def healthz() -> dict[str, str]:
    """The process answers. Says nothing about engines; see /readyz."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when the database answers, stores what it is given, and every engine (one at least of its replicas) has
    loaded its model, here or at another gateway, else 503, as while this gateway shuts down.

    The answer has the state of each. What is wrong with an engine or the database names paths and hosts: it is told to
    callers who may use the gateway.
    """
    gateway = gateway_of(request)
    await gateway.store.answers()
    problem = await gateway.store.problem()
    known = await _is_known(gateway, request)
    supervisors = [dispatcher.supervisor for dispatcher in gateway.fleet.dispatchers.values()]
    engines = {supervisor.engine.name: _describe(supervisor, known) for supervisor in supervisors}
    draining = gateway.fleet.draining
    groups = gateway.fleet.entries.values()
    ready = all(any(each.ready for each in group.active.values()) for group in groups)
    ready = ready and not draining and problem is None
    state: dict[str, Any] = {"ready": ready, "draining": draining, "engines": engines}
    if problem is not None:
        state["problem"] = problem if known else "the database does not store what it is given"
    return JSONResponse(state, 200 if ready else 503)


async def _is_known(gateway: Gateway, request: Request) -> bool:
    try:
        await gateway.keys.caller(request)
    except (Unauthorized, Forbidden):
        return False
    return True


def _describe(supervisor: Supervisor, known: bool) -> str:
    state = str(supervisor.wherever)
    if supervisor.state is EngineState.WAITING:
        state += " at another gateway"
    unwell = known and supervisor.trouble and supervisor.wherever is not EngineState.READY
    return f"{state}: {supervisor.trouble}" if unwell else state
