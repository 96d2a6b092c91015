"""Opening a connection: configuration, capabilities, sessions, heartbeats."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request, Response

from gateway.auth import Owner
from gateway.state import Running
from gateway.store.records import Session
from gateway.store.sessions import Finish
from gateway.tinker import schemas
from gateway.tinker.custom_losses import uploads_losses
from gateway.tinker.edge import idempotency_key, json_body, json_reply, read_body, takes
from gateway.tinker.routing import topic

router = topic()

_REFRESH_S = 300
_CANCELS_AT_A_TIME = 64


@router.post("/client/config", openapi_extra=takes(schemas.ClientConfig))
async def client_config(request: Request, owner: Owner, gateway: Running) -> Response:
    """Flags of the client's transport; what is not named is the default of its SDK version, which fits this server."""
    body = await json_body(request, schemas.ClientConfig)
    return json_reply(
        {
            "custom_loss_server_side": uploads_losses(gateway, body.sdk_version),
            "pjwt_auth_enabled": gateway.settings.token_exchange,
            "sample_use_retrieve_futures": gateway.settings.completion_queue,
            "sample_join_sampling_session": True,
        }
    )


@router.post("/client/dynamic_config", openapi_extra=takes(schemas.ClientConfig))
async def client_dynamic_config(request: Request, owner: Owner) -> Response:
    """Flags that the client reads again from time to time."""
    await json_body(request, schemas.ClientConfig)
    return json_reply(
        {
            "refresh_interval_sec": _REFRESH_S,
            "sample_cancel_enabled": True,
            "sample_cancel_max_batch_size": _CANCELS_AT_A_TIME,
        }
    )


@router.get("/get_server_capabilities")
async def get_server_capabilities(owner: Owner, gateway: Running) -> dict[str, Any]:
    """The base models that are served, and for what."""
    models: dict[str, dict[str, Any]] = {}
    for dispatcher in gateway.fleet.dispatchers.values():
        engine, info = dispatcher.supervisor.engine, dispatcher.supervisor.info
        row = models.setdefault(
            engine.base_model, {"model_name": engine.base_model, "trainable": False, "sampleable": False}
        )
        row["trainable"] |= "train" in engine.roles
        row["sampleable"] |= "sample" in engine.roles
        if info is not None:
            row["max_context_length"] = min(info.max_context, row.get("max_context_length", info.max_context))
    return {"supported_models": list(models.values())}


@router.post("/create_session", openapi_extra=takes(schemas.CreateSession))
async def create_session(request: Request, owner: Owner, gateway: Running) -> Response:
    """Begin a session; a retry with the same idempotency key gets the same one."""
    body = await json_body(request, schemas.CreateSession)
    now = time.time()
    session = Session(
        session_id=str(uuid.uuid4()),
        owner=owner,
        idempotency_key=idempotency_key(request),
        user_metadata=body.user_metadata or {},
        tags=body.tags or [],
        sdk_version=body.sdk_version or "",
        project_id=body.project_id,
        display_name=body.display_name,
        created_at=now,
        heartbeat_at=now,
    )
    stored = await gateway.store.sessions.create(session)
    return json_reply({"type": "create_session", "session_id": stored.session_id})


@router.post("/session_heartbeat", openapi_extra=takes(schemas.SessionHeartbeat))
async def session_heartbeat(request: Request, owner: Owner, gateway: Running) -> Response:
    """The client is alive; 410 tells it that the session is over."""
    body = await json_body(request, schemas.SessionHeartbeat)
    await gateway.heard_of(owner, body.session_id)
    return json_reply({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", openapi_extra=takes(schemas.FinishSession))
async def finish_session(request: Request, session_id: str, owner: Owner, gateway: Running) -> Response:
    """The client is done: the memory of its runs is freed, everything stored stays. Repeating it changes nothing."""
    body = await json_body(request, schemas.FinishSession)
    await gateway.session(owner, session_id)
    reason = body.reason.type if body.reason is not None else "success"
    await gateway.store.sessions.finish(Finish(session_id, reason, body.detail))
    gateway.known_sessions.forget(session_id)
    for run in await gateway.store.runs.of_session(session_id):
        await gateway.fleet.drop_run(run)
    return json_reply({})


@router.post("/telemetry", openapi_extra=takes(schemas.Telemetry))
async def telemetry(request: Request, owner: Owner) -> Response:
    """Accepted and thrown away: events can hold keys and prompts, and nothing here needs them."""
    await read_body(request)
    return json_reply({"status": "accepted"})
