"""Samplers and samples."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from engines.interface import UserError
from gateway.auth import Owner
from gateway.errors import BadRequest, Unprocessable
from gateway.state import Gateway, Running
from gateway.store.records import Future, Sampler
from gateway.store.samplers import require_same_weights
from gateway.submit import draw_seed, sampler_id_of, submit_rejected_sample, submit_sample
from gateway.tinker import requests, schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import idempotency_key, in_thread_if_large, json_body, json_reply, read_body, takes
from gateway.tinker.operations import digest_of_call
from gateway.tinker.routing import topic
from gateway.tinker.sessionless import sessionless_sampler, store_sampler, weights_to_sample
from gateway.turns import Turn

router = topic()


@router.post("/create_sampling_session", openapi_extra=takes(schemas.CreateSamplingSession))
async def create_sampling_session(request: Request, owner: Owner, gateway: Running) -> Response:
    """A sampler of a base model, or of a checkpoint; it never changes, whatever becomes of the run."""
    body = await json_body(request, schemas.CreateSamplingSession)
    session = await gateway.live_session(owner, body.session_id)
    sampler_id = sampler_id_of(session.session_id, body.sampling_session_seq_id)
    known = await gateway.known_samplers.get(sampler_id)
    if known is not None:  # sent again; its checkpoint may have gone meanwhile
        require_same_weights(known, body.base_model, body.model_path)
    else:
        weights = await weights_to_sample(gateway, owner, body.base_model, body.model_path)
        await store_sampler(gateway, session, sampler_id, weights)
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
    digest = await digest_of_call(request, raw)
    try:
        body = await in_thread_if_large(raw, lambda: parse_json(raw, schemas.SampleBody))
    except Unprocessable as error:
        envelope = parse_json(raw, schemas.SampleEnvelope)
        if envelope.sampling_session_id is None or envelope.seq_id is None:
            raise
        sampler = await gateway.sampler(owner, envelope.sampling_session_id)
        turn = Turn(envelope.seq_id, digest=digest)
        return _promise(await submit_rejected_sample(gateway, sampler, turn, error.message), 1)
    sampler = await _sampler_of(gateway, owner, body)
    turn = Turn.of_sample(body.seq_id, idempotency_key(request), digest)
    samples = body.num_samples if body.num_samples is not None else 1
    try:
        sample = requests.sample_of(body, draw_seed)
    except UserError as error:
        return _promise(await submit_rejected_sample(gateway, sampler, turn, str(error)), samples)
    return _promise(await submit_sample(gateway, sampler, turn, sample), samples)


async def _sampler_of(gateway: Gateway, owner: str, body: schemas.SampleBody) -> Sampler:
    if body.sampling_session_id is None:
        return await sessionless_sampler(gateway, owner, body.base_model, body.model_path)
    for field in ("base_model", "model_path"):
        if getattr(body, field) is not None:
            raise BadRequest(f"{field} belongs to the sampling session; leave it out here", param=field)
    return await gateway.sampler(owner, body.sampling_session_id)


def _promise(future: Future, samples: int) -> Response:
    """`sample_sequence_ids` are needed by every SDK since 0.27, one for each sample."""
    ids = [f"{future.request_id}:{index}" for index in range(max(0, min(samples, _LARGEST_SAMPLES)))]
    return json_reply({"request_id": future.request_id, "sample_sequence_ids": ids})


_LARGEST_SAMPLES = 1024
"""More samples are refused by the engine's checks, so more ids are never looked at."""
