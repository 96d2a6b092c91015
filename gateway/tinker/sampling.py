"""Samplers and samples."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response

from engines.interface import UserError
from gateway.auth import Owner
from gateway.checkpoints import loadable_checkpoint
from gateway.errors import BadRequest, Unprocessable
from gateway.state import Running
from gateway.store.records import Future, Sampler
from gateway.submit import draw_seed, sampler_id_of, submit_rejected_sample, submit_sample
from gateway.tinker import requests, schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import in_thread_if_large, json_body, json_reply, read_body, takes
from gateway.tinker.routing import topic

router = topic()


@router.post("/create_sampling_session", openapi_extra=takes(schemas.CreateSamplingSession))
async def create_sampling_session(request: Request, owner: Owner, gateway: Running) -> Response:
    """A sampler of a base model, or of a checkpoint; it never changes, whatever becomes of the run."""
    body = await json_body(request, schemas.CreateSamplingSession)
    session = await gateway.live_session(owner, body.session_id)
    sampler_id = sampler_id_of(session.session_id, body.sampling_session_seq_id)
    if (
        await gateway.known_samplers.get(sampler_id) is not None
    ):  # sent again; its checkpoint may have gone meanwhile
        return _session_reply(sampler_id)
    base_model, run_id, folder = body.base_model, None, None
    if body.model_path is not None:
        checkpoint = await loadable_checkpoint(gateway.store, owner, body.model_path, param="model_path")
        if base_model is not None and base_model != checkpoint.base_model:
            raise BadRequest(
                f"base_model is {base_model!r}, but {body.model_path} is of {checkpoint.base_model!r}",
                param="base_model",
            )
        base_model, run_id, folder = checkpoint.base_model, checkpoint.run_id, checkpoint.folder
    if base_model is None:
        raise BadRequest("give base_model or model_path", param="base_model")
    engine = gateway.fleet.for_base_model(base_model, "sample").supervisor.engine
    sampler = Sampler(
        sampler_id=sampler_id,
        owner=owner,
        session_id=session.session_id,
        engine=engine.name,
        base_model=base_model,
        run_id=run_id,
        path=body.model_path,
        folder=folder,
        created_at=time.time(),
    )
    await gateway.store.samplers.create(sampler)
    return _session_reply(sampler_id)


def _session_reply(sampler_id: str) -> Response:
    return json_reply({"sampling_session_id": sampler_id, "type": "create_sampling_session"})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, owner: Owner, gateway: Running) -> dict[str, Any]:
    """What a sampler samples."""
    sampler = await gateway.sampler(owner, sampler_id)
    body = {"sampler_id": sampler.sampler_id, "base_model": sampler.base_model}
    return body if sampler.path is None else {**body, "model_path": sampler.path}


@router.post("/join_sampling_session", openapi_extra=takes(schemas.JoinSamplingSession))
async def join_sampling_session(request: Request, owner: Owner, gateway: Running) -> Response:
    """A number for a further client of a sampler, so that no two of them number samples alike."""
    body = await json_body(request, schemas.JoinSamplingSession)
    sampler = await gateway.sampler(owner, body.sampling_session_id)
    number = await gateway.store.samplers.join(sampler.sampler_id)
    return json_reply({"type": "join_sampling_session", "client_counter": number})


@router.post("/asample", openapi_extra=takes(schemas.SampleBody))
async def asample(request: Request, owner: Owner, gateway: Running) -> Response:
    """Draw continuations of a prompt. Samples have no order; a repeated seq_id is the same sample."""
    raw = await read_body(request)
    try:
        body = await in_thread_if_large(raw, lambda: parse_json(raw, schemas.SampleBody))
    except Unprocessable as error:
        envelope = parse_json(raw, schemas.SampleEnvelope)
        sampler = await gateway.sampler(owner, envelope.sampling_session_id)
        return _promise(await submit_rejected_sample(gateway, sampler, envelope.seq_id, error.message), 1)
    sampler = await gateway.sampler(owner, body.sampling_session_id)
    samples = body.num_samples if body.num_samples is not None else 1
    try:
        sample = requests.sample_of(body, draw_seed)
    except UserError as error:
        return _promise(await submit_rejected_sample(gateway, sampler, body.seq_id, str(error)), samples)
    return _promise(await submit_sample(gateway, sampler, body.seq_id, sample), samples)


def _promise(future: Future, samples: int) -> Response:
    """`sample_sequence_ids` are needed by every SDK since 0.27, one for each sample."""
    ids = [f"{future.request_id}:{index}" for index in range(max(0, min(samples, _LARGEST_SAMPLES)))]
    return json_reply({"request_id": future.request_id, "sample_sequence_ids": ids})


_LARGEST_SAMPLES = 1024
"""More samples are refused by the engine's checks, so more ids are never looked at."""
