"""Fetching results."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from gateway.auth import Owner
from gateway.completions import Poll
from gateway.errors import NotFound, StoreUnavailable
from gateway.presence import while_connected
from gateway.state import Gateway, Running
from gateway.store.records import FutureStatus
from gateway.supervisor import EngineState
from gateway.tinker import results, schemas
from gateway.tinker.custom_losses import outcome_of_loss
from gateway.tinker.edge import in_thread_if_large, json_body, json_reply, takes
from gateway.tinker.routing import topic

router = topic()

_OUTAGE_PAUSE_S = 2.0
_BEGINNINGS = ("create_run", "sample")


@router.post("/retrieve_future", openapi_extra=takes(schemas.RetrieveFuture))
async def retrieve_future(request: Request, owner: Owner, gateway: Running) -> Response:
    """The outcome of a promise: waits for it some while, then says `try_again`. Can be fetched more than once."""
    body = await json_body(request, schemas.RetrieveFuture)
    unloaded_run = body.request_id.removesuffix(":unload")
    if unloaded_run != body.request_id:
        run = await gateway.run(owner, unloaded_run)
        return _json({"model_id": run.run_id, "type": "unload_model"})
    made_at_once = await outcome_of_loss(gateway, owner, body.request_id)
    if made_at_once is not None:
        return _json(made_at_once)
    try:
        settled = await gateway.futures.outcome(
            body.request_id, owner, gateway.settings.hold_s, request.is_disconnected
        )
    except StoreUnavailable as error:
        await asyncio.sleep(
            _OUTAGE_PAUSE_S
        )  # the SDK would repeat a 503 at once, a storm for a database that recovers
        return _json(results.pending(body.request_id, "paused_capacity", error.message))
    if settled is None:
        return _json(await _while_open(gateway, body.request_id))
    if settled.future.status is FutureStatus.FAILED or settled.result is None:
        return _json(results.failure(settled.future))
    future, result = settled.future, settled.result
    protobuf = results.PROTOBUF in request.headers.get("accept", "")
    content, media_type = await in_thread_if_large(
        result, lambda: results.render(future, result, protobuf=protobuf)
    )
    if body.allow_metadata_only and len(content) >= gateway.settings.announced_result_bytes:
        return _json({"status": "complete_metadata", "response_payload_size": len(content)})
    return Response(content, media_type=media_type)


@router.post("/retrieve_futures", openapi_extra=takes(schemas.RetrieveFutures))
async def retrieve_futures(request: Request, owner: Owner, gateway: Running) -> Response:
    """Which samples of one client of a sampler are finished, behind a cursor: waits some while for the first."""
    body = await json_body(request, schemas.RetrieveFutures)
    sampler = await gateway.sampler(owner, body.target.sampling_session_id)
    poll = Poll(
        sampler,
        client=body.target.cloned_sampler_id or 0,
        cursor=body.prev_cursor or 0,
        retrieved=frozenset(body.retrieved_request_ids or ()),
    )
    hold_s = gateway.settings.hold_s
    left = hold_s if body.timeout is None else min(body.timeout, hold_s)
    found = await while_connected(request.receive, gateway.completions.poll(poll, left))
    completions = [
        {"state": "failed" if each.failed else "finished", "request_id": each.request_id} for each in found
    ]
    return json_reply({"completions": completions, "cursor": found[-1].cursor if found else poll.cursor})


@router.post("/cancel_future", openapi_extra=takes(schemas.CancelFuture))
async def cancel_future(request: Request, owner: Owner, gateway: Running) -> Response:
    """Give up a sample, waiting or under way. What is finished stays so, and a run's operations are never given up."""
    body = await json_body(request, schemas.CancelFuture)
    future = await gateway.store.futures.get(body.request_id)
    if future is None or future.owner != owner:
        raise NotFound(f"there is no future {body.request_id!r}", param="request_id")
    cancelled = future.open and future.kind == "sample"
    if cancelled:
        await gateway.fleet.give_up(future)
    return json_reply({"cancelled": cancelled})


async def _while_open(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """Why it takes long: the state of this future's own engine, and its place there.

    What would begin on an engine that cannot load its model is told so: its sender need not wait for an operator. What
    belongs to a run that is under way waits.
    """
    future = await gateway.futures.find(request_id)
    dispatcher = gateway.fleet.dispatchers.get(future.engine) if future is not None else None
    if future is None or dispatcher is None:
        return results.pending(request_id, "paused_capacity", "its engine is not in this gateway's settings")
    supervisor = dispatcher.supervisor
    if supervisor.wherever is EngineState.FAILED and future.kind in _BEGINNINGS:
        error = f"the engine of {supervisor.engine.base_model} cannot load it: {supervisor.trouble}"
        return results.failure(replace(future, error=error, error_category="user"))
    standing = dispatcher.standing(future)
    return results.pending(request_id, "paused_capacity" if standing.paused else "active", standing.reason)


def _json(value: dict[str, object]) -> Response:
    return Response(json.dumps(value).encode(), media_type=results.JSON)
