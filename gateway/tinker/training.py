"""Runs and what trains them. Every call here answers with a promise; its result comes from retrieve_future."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from engines.operations import Forward, ForwardBackward
from gateway.auth import Owner
from gateway.state import Gateway, Running
from gateway.store.records import Future, Run
from gateway.submit import KIND_OF, NewRun, draw_seed, submit_operation, submit_run
from gateway.tinker import requests, schemas
from gateway.tinker.custom_losses import with_custom_loss
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import in_thread_if_large, json_body, json_reply, read_body, takes
from gateway.tinker.operations import accept_json, accept_or_reject, digest_of_call, message_of_pass, promise
from gateway.tinker.results import PROTOBUF
from gateway.tinker.routing import topic
from gateway.tinker.sessionless import session_of_run
from gateway.turns import Turn

router = topic()


@router.post("/create_model", openapi_extra=takes(schemas.CreateModel))
async def create_model(request: Request, owner: Owner, gateway: Running) -> Response:
    """Begin a run with a fresh adapter."""
    raw = await read_body(request)
    digest = await digest_of_call(request, raw)
    body = await in_thread_if_large(raw, lambda: parse_json(raw, schemas.CreateModel))
    requests.require_adamw(body.optimizer_config)
    session = await session_of_run(request, gateway, owner, body.session_id)
    lora = requests.lora_of(body.lora_config, draw_seed)
    new = NewRun(session, body.model_seq_id or 0, body.base_model, lora, body.user_metadata or {}, digest)
    return promise(await submit_run(gateway, new))


@router.post("/get_info", openapi_extra=takes(schemas.GetInfo))
async def get_info(request: Request, owner: Owner, gateway: Running) -> Response:
    """What a run is."""
    body = await json_body(request, schemas.GetInfo)
    run = await gateway.run(owner, body.model_id)
    info = gateway.dispatcher_of(run).supervisor.info
    return json_reply(
        {
            "type": "get_info",
            "model_id": run.run_id,
            "model_data": {
                "arch": info.architecture if info is not None else None,
                "model_name": run.base_model,
                "tokenizer_id": run.base_model,
            },
            "model_name": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora["rank"],
            "optimizer_config": {"type": run.optimizer},
        }
    )


@router.post("/forward_backward", openapi_extra=takes(schemas.ForwardBackwardBody, PROTOBUF))
async def forward_backward(request: Request, owner: Owner, gateway: Running) -> Response:
    """Gradients of a loss, or with `forward_only` only its numbers. Protobuf, or the JSON form of older SDKs."""
    if not request.headers.get("content-type", "").startswith(PROTOBUF):
        return await _json_pass(request, owner, gateway, ForwardBackward)
    body, message = await message_of_pass(request, gateway, owner)
    envelope = requests.envelope_of(message)
    run = await gateway.live_run(owner, envelope.model_id)
    kind = "forward" if envelope.forward_only else "forward_backward"
    turn = Turn(envelope.seq_id, digest=await digest_of_call(request, body))

    async def submit() -> Future:
        operation = await in_thread_if_large(body, lambda: requests.pass_of(message))
        operation = await with_custom_loss(gateway, run, operation)
        return await submit_operation(gateway, run, turn, operation)

    return await accept_or_reject(gateway, run, turn, kind, submit)


@router.post("/forward", openapi_extra=takes(schemas.ForwardBackwardBody))
async def forward(request: Request, owner: Owner, gateway: Running) -> Response:
    """The numbers of a loss without its gradients, as older SDKs ask for them."""
    return await _json_pass(request, owner, gateway, Forward)


async def _json_pass(request: Request, owner: str, gateway: Gateway, kind: type[requests.Pass]) -> Response:
    async def submit(run: Run, turn: Turn, body: schemas.ForwardBackwardBody) -> Future:
        operation = await asyncio.to_thread(requests.pass_of_json, body, kind)
        operation = await with_custom_loss(gateway, run, operation)
        return await submit_operation(gateway, run, turn, operation)

    return await accept_json(request, gateway, owner, schemas.ForwardBackwardBody, KIND_OF[kind], submit)


@router.post("/optim_step", openapi_extra=takes(schemas.OptimStepBody))
async def optim_step(request: Request, owner: Owner, gateway: Running) -> Response:
    """One optimizer step with the gradients that have been added up."""

    async def submit(run: Run, turn: Turn, body: schemas.OptimStepBody) -> Future:
        return await submit_operation(gateway, run, turn, requests.optim_step_of(body))

    return await accept_json(request, gateway, owner, schemas.OptimStepBody, "optim_step", submit)


@router.post("/unload_model", openapi_extra=takes(schemas.UnloadModel))
async def unload_model(request: Request, owner: Owner, gateway: Running) -> Response:
    """End a run: its memory is freed, its checkpoints stay. Done when this is answered; the promise is fulfilled."""
    body = await json_body(request, schemas.UnloadModel)
    run = await gateway.run(owner, body.model_id)
    await gateway.store.runs.unload(run.run_id)
    gateway.known_runs.forget(run.run_id)
    await gateway.fleet.drop_run(run)
    return json_reply({"request_id": f"{run.run_id}:unload", "model_id": run.run_id})
