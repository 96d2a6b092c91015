"""Fetching results."""

from __future__ import annotations

import asyncio
import json

from fastapi import Request, Response

from gateway.auth import Owner
from gateway.completions import Poll
from gateway.errors import NotFound, StoreUnavailable
from gateway.state import Gateway, Running
from gateway.store.records import FutureStatus
from gateway.supervisor import EngineState
from gateway.tinker import results, schemas
from gateway.tinker.edge import in_thread_if_large, json_body, json_reply, takes
from gateway.tinker.routing import topic

router = topic()

_OUTAGE_PAUSE_S = 2.0

_ATTENTIVE_S = 2.0


@router.post("/retrieve_future", openapi_extra=takes(schemas.RetrieveFuture))
async def retrieve_future(request: Request, owner: Owner, gateway: Running) -> Response:
    """The outcome of a promise: waits for it some while, then says `try_again`. Can be fetched more than once."""
    body = await json_body(request, schemas.RetrieveFuture)
    unloaded_run = body.request_id.removesuffix(":unload")
    if unloaded_run != body.request_id:
        run = await gateway.run(owner, unloaded_run)
        return _json({"model_id": run.run_id, "type": "unload_model"})
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
        return _json(results.pending(body.request_id, *_queue_state(gateway)))
    if settled.future.status is FutureStatus.FAILED or settled.result is None:
        return _json(results.failure(settled.future))
    future, result = settled.future, settled.result
    protobuf = results.PROTOBUF in request.headers.get("accept", "")
    content, media_type = await in_thread_if_large(
        result, lambda: results.render(future, result, protobuf=protobuf)
    )
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
    while True:
        found = await gateway.completions.poll(poll, min(left, _ATTENTIVE_S))
        left -= _ATTENTIVE_S
        if found or left <= 0 or await request.is_disconnected():
            break
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
        gateway.fleet.give_up(future)
    return json_reply({"cancelled": cancelled})


def _queue_state(gateway: Gateway) -> tuple[str, str | None]:
    """Why it takes long, as far as the client can be told."""
    for dispatcher in gateway.fleet.dispatchers.values():
        supervisor = dispatcher.supervisor
        if supervisor.state is not EngineState.READY:
            return "paused_capacity", f"the engine of {supervisor.engine.base_model} is {supervisor.state}"
    return "active", None


def _json(value: dict[str, object]) -> Response:
    return Response(json.dumps(value).encode(), media_type=results.JSON)
