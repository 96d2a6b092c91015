"""The routes. Everything is the caller's own, unless the caller's key is an admin's."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query

from gateway.admin import views
from gateway.admin.checkpoints import router as checkpoints
from gateway.admin.comparison import router as comparison
from gateway.admin.cursors import decode_cursor, next_cursor
from gateway.admin.replicas import router as replicas
from gateway.admin.scope import Cursor, Filter, Limit, OwnerFilter, scope, visible
from gateway.auth import Caller, Who
from gateway.errors import Forbidden, NotFound
from gateway.queries import KnownQueryRoute
from gateway.state import Gateway, Running
from gateway.store.records import FutureStatus, Run, RunStatus

router = APIRouter(prefix="/admin/v1", tags=["admin"], route_class=KnownQueryRoute)
router.routes.extend(checkpoints.routes)
router.routes.extend(comparison.routes)
router.routes.extend(replicas.routes)


@router.get("/runs")
async def list_runs(
    caller: Who,
    gateway: Running,
    limit: Limit = 100,
    cursor: Cursor = None,
    owner: OwnerFilter = None,
    status: RunStatus | None = None,
    base_model: Filter = None,
    session_id: Filter = None,
) -> views.Page[views.RunView]:
    """Runs, newest first."""
    filters = {
        "owner": scope(caller, owner),
        "status": status,
        "base_model": base_model,
        "session_id": session_id,
    }
    runs = await gateway.store.runs.page(limit=limit, before=decode_cursor(cursor), where=filters)
    items = [_run_view(gateway, run) for run in runs]
    return views.Page(
        items=items, next_cursor=next_cursor(runs, limit, lambda run: (run.created_at, run.run_id))
    )


@router.get("/runs/{run_id}")
async def get_run(run_id: str, caller: Who, gateway: Running) -> views.RunView:
    """One run."""
    run = await _run(gateway, caller, run_id)
    return _run_view(gateway, run)


@router.get("/runs/{run_id}/metrics")
async def get_run_metrics(
    run_id: str,
    caller: Who,
    gateway: Running,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="only steps above this one")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[views.StepView]:
    """Loss, gradient norm, tokens and seconds of each optimizer step, in order."""
    await _run(gateway, caller, run_id)
    return [
        views.step_view(step) for step in await gateway.store.runs.steps(run_id, after=after, limit=limit)
    ]


@router.get("/runs/{run_id}/snapshots")
async def list_run_snapshots(run_id: str, caller: Who, gateway: Running) -> list[views.SnapshotView]:
    """The states of a run that the server keeps for its own recovery, newest first."""
    await _run(gateway, caller, run_id)
    return [views.snapshot_view(snapshot) for snapshot in await gateway.store.snapshots.of_run(run_id)]


@router.get("/sessions")
async def list_sessions(
    caller: Who, gateway: Running, limit: Limit = 100, cursor: Cursor = None, owner: OwnerFilter = None
) -> views.Page[views.SessionView]:
    """Sessions, newest first."""
    rows = await gateway.store.sessions.page(
        limit=limit, before=decode_cursor(cursor), where={"owner": scope(caller, owner)}
    )
    items = [views.session_view(row) for row in rows]
    position = next_cursor(rows, limit, lambda row: (row.created_at, row.session_id))
    return views.Page(items=items, next_cursor=position)


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, caller: Who, gateway: Running) -> views.SessionView:
    """One session."""
    session = await gateway.store.sessions.get(session_id)
    if session is None or not visible(caller, session.owner):
        raise NotFound(f"there is no session {session_id!r}")
    return views.session_view(session)


@router.get("/futures")
async def list_futures(
    caller: Who,
    gateway: Running,
    limit: Limit = 100,
    cursor: Cursor = None,
    owner: OwnerFilter = None,
    status: FutureStatus | None = None,
    kind: Filter = None,
    run_id: Filter = None,
    engine: Filter = None,
) -> views.Page[views.FutureView]:
    """Accepted calls, newest first."""
    filters = {
        "owner": scope(caller, owner),
        "status": status,
        "kind": kind,
        "run_id": run_id,
        "engine": engine,
    }
    rows = await gateway.store.futures.page(limit=limit, before=decode_cursor(cursor), where=filters)
    items = [views.future_view(row) for row in rows]
    position = next_cursor(rows, limit, lambda row: (row.created_at, row.request_id))
    return views.Page(items=items, next_cursor=position)


@router.get("/futures/{request_id}")
async def get_future(request_id: str, caller: Who, gateway: Running) -> views.FutureView:
    """One accepted call."""
    future = await gateway.store.futures.get(request_id)
    if future is None or not visible(caller, future.owner):
        raise NotFound(f"there is no future {request_id!r}")
    return views.future_view(future)


@router.get("/engines")
async def list_engines(caller: Who, gateway: Running) -> views.Page[views.EngineView]:
    """The engine processes of this gateway, all on one page."""
    items = [views.engine_view(dispatcher) for dispatcher in gateway.fleet.dispatchers.values()]
    return views.Page(items=items, next_cursor=None)


@router.get("/engines/{name}")
async def get_engine(name: str, caller: Who, gateway: Running) -> views.EngineView:
    """One engine process."""
    dispatcher = gateway.fleet.dispatchers.get(name)
    if dispatcher is None:
        raise NotFound(f"there is no engine {name!r}; there are {', '.join(gateway.fleet.dispatchers)}")
    return views.engine_view(dispatcher)


@router.get("/duties")
async def list_duties(caller: Who, gateway: Running) -> views.Page[views.DutyView]:
    """What the gateways do in the background, by name, all on one page; for admins."""
    if not caller.admin:
        raise Forbidden("the duties of the gateways are shown to an admin's key only")
    items = [views.duty_view(duty) for duty in await gateway.store.duties.all()]
    return views.Page(items=items, next_cursor=None)


@router.get("/metrics")
async def get_metrics(caller: Who, gateway: Running) -> views.MetricsView:
    """Counters of this gateway process; for admins."""
    if not caller.admin:
        raise Forbidden("the metrics of the whole gateway are shown to an admin's key only")
    open_futures: dict[str, dict[str, int]] = {}
    for (engine, status), count in (await gateway.store.futures.counts()).items():
        open_futures.setdefault(engine, {})[status] = count
    engines = {}
    for name, dispatcher in gateway.fleet.dispatchers.items():
        process, residency = dispatcher.supervisor.process, dispatcher.training.residency
        engines[name] = {
            **(process.stats if process is not None else {}),
            "resident_runs": float(len(residency)),
            "waiting_runs": float(residency.waiting),
            "run_bytes": float(residency.used),
            "run_memory_bytes": float(residency.limit),
            "evictions": float(residency.evictions),
            "restores": float(residency.restores),
            "starts": float(dispatcher.supervisor.starts),
            "open_samples": float(dispatcher.load),
        }
    return views.MetricsView(
        pid=os.getpid(),
        data_dir=str(gateway.settings.data_dir.absolute()),
        uptime_s=time.time() - gateway.started_at,
        resident_bytes=_resident_bytes(),
        open_futures=open_futures,
        engines=engines,
    )


def _run_view(gateway: Gateway, run: Run) -> views.RunView:
    engine = gateway.fleet.dispatchers.get(run.engine)
    return views.run_view(run, engine)


async def _run(gateway: Gateway, caller: Caller, run_id: str) -> Run:
    run = await gateway.store.runs.get(run_id)
    if run is None or not visible(caller, run.owner):
        raise NotFound(f"there is no run {run_id!r}")
    return run


def _resident_bytes() -> int:
    """Memory of this process, by the operating system's account; 0 where it gives none."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
