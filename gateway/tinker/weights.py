"""Saving and loading weights."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from engines.interface import UserError
from engines.operations import LoraSpec
from gateway.auth import Owner
from gateway.checkpoints import loadable_checkpoint, readable_checkpoint
from gateway.errors import BadRequest, Unprocessable
from gateway.futures import require_same
from gateway.sealing import parse_recipients
from gateway.state import Gateway, Running
from gateway.store.records import CheckpointKind, Future, Run, Session
from gateway.submit import (
    NewRun,
    SaveRequest,
    run_id_of,
    sampler_id_of,
    submit_load,
    submit_run,
    submit_save,
)
from gateway.tinker import requests, schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import idempotency_key, json_body, json_reply, read_body, takes
from gateway.tinker.operations import accept_json, accept_or_reject, digest_of_call, promise, reject
from gateway.tinker.routing import topic
from gateway.turns import Turn, request_id_of

router = topic()


@router.post("/save_weights", openapi_extra=takes(schemas.SaveWeights))
async def save_weights(request: Request, owner: Owner, gateway: Running) -> Response:
    """A named checkpoint with everything that training needs to go on."""

    async def submit(run: Run, turn: Turn, body: schemas.SaveWeights) -> Future:
        save = SaveRequest(
            CheckpointKind.TRAINING,
            name=body.path,
            overwrite=bool(body.overwrite),
            ttl_seconds=body.ttl_seconds,
            user_metadata=body.user_metadata,
        )
        return await submit_save(gateway, run, turn, save)

    return await accept_json(request, gateway, owner, schemas.SaveWeights, "save_weights", submit)


@router.post("/save_weights_for_sampler", openapi_extra=takes(schemas.SaveWeightsForSampler))
async def save_weights_for_sampler(request: Request, owner: Owner, gateway: Running) -> Response:
    """A named checkpoint for sampling, or an unnamed sampler of the weights as they are now."""

    async def submit(run: Run, turn: Turn, body: schemas.SaveWeightsForSampler) -> Future:
        return await submit_save(gateway, run, turn, _sampler_save(run, body))

    return await accept_json(
        request, gateway, owner, schemas.SaveWeightsForSampler, "save_weights", submit, _same_save
    )


def _same_save(body: schemas.SaveWeightsForSampler) -> schemas.SaveWeightsForSampler:
    """The SDK counts the sampler's number on when it sends a save again; the operation's number says which it is."""
    if body.sampling_session_seq_id is None:
        return body
    return msgspec.structs.replace(body, sampling_session_seq_id=0)


def _sampler_save(run: Run, body: schemas.SaveWeightsForSampler) -> SaveRequest:
    if body.kind not in (None, "snapshot", "inflight"):
        raise UserError(f"kind is {body.kind[:40]!r}; allowed are snapshot and inflight")
    inflight = body.kind == "inflight"
    if inflight and body.path is not None:
        raise UserError("kind is inflight, which has no name: give sampling_session_seq_id instead of path")
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise UserError(
            "give either path, a name for the checkpoint, or sampling_session_seq_id, for an unnamed one"
        )
    if body.sampling_session_seq_id is not None:
        if body.ttl_seconds is not None or body.user_metadata is not None:
            raise UserError("ttl_seconds and user_metadata belong to a checkpoint: give it a name in path")
        sampler_id = sampler_id_of(run.session_id, body.sampling_session_seq_id)
        return SaveRequest(
            CheckpointKind.SAMPLER, sampler_id=sampler_id, session_id=run.session_id, inflight=inflight
        )
    return SaveRequest(
        CheckpointKind.SAMPLER, name=body.path, ttl_seconds=body.ttl_seconds, user_metadata=body.user_metadata
    )


@router.post("/save_weights_external", openapi_extra=takes(schemas.SaveWeightsExternal))
async def save_weights_external(request: Request, owner: Owner, gateway: Running) -> Response:
    """Weights as files to download, in PEFT's layout; encrypted with age when recipients are named."""

    async def submit(run: Run, turn: Turn, body: schemas.SaveWeightsExternal) -> Future:
        recipients = body.age_encryption_recipients
        if recipients is not None:
            parse_recipients(recipients)
        save = SaveRequest(
            CheckpointKind.EXTERNAL,
            name=body.path,
            ttl_seconds=body.ttl_seconds,
            recipients=tuple(recipients or ()),
        )
        return await submit_save(gateway, run, turn, save)

    return await accept_json(request, gateway, owner, schemas.SaveWeightsExternal, "save_weights", submit)


@router.post("/load_weights", openapi_extra=takes(schemas.LoadWeights))
async def load_weights(request: Request, owner: Owner, gateway: Running) -> Response:
    """Begin a run at a checkpoint (session_id and model_seq_id), or load one into a run (model_id and seq_id)."""
    raw = await read_body(request)
    digest = await digest_of_call(request, raw)
    try:
        body = parse_json(raw, schemas.LoadWeights)
    except Unprocessable as error:
        envelope = parse_json(raw, schemas.LoadEnvelope)
        if envelope.model_id is None or envelope.seq_id is None:
            raise
        turn = Turn(envelope.seq_id, digest=digest)
        return await reject(gateway, owner, envelope.model_id, turn, "load_weights", error.message)
    if body.model_id is not None:
        run = await gateway.live_run(owner, body.model_id)
        async with gateway.turns.turn(run.run_id, body.seq_id, idempotency_key(request), digest) as turn:
            return await accept_or_reject(
                gateway, run, turn, "load_weights", lambda: _load_into(gateway, run, turn, body)
            )
    if body.session_id is None or body.model_seq_id is None:
        raise Unprocessable(
            "give session_id and model_seq_id to begin a run, or model_id and seq_id to load into one"
        )
    session = await gateway.live_session(owner, body.session_id)
    return promise(await _begin_at(gateway, session, body.model_seq_id, body, digest))


async def _load_into(gateway: Gateway, run: Run, turn: Turn, body: schemas.LoadWeights) -> Future:
    saving = await gateway.store.checkpoints.to_be_saved(run.run_id, body.path, turn.number)
    if saving is not None:  # what stands under the path now, if anything, is not what is asked for
        raise UserError(
            f"{body.path} is still to be saved, by operation {saving} of this run: wait for its result, then load it"
        )
    token_owner = await gateway.keys.owner_of(body.weights_access_token)
    checkpoint = await loadable_checkpoint(gateway.store, run.owner, body.path, also_of=token_owner)
    if checkpoint.base_model != run.base_model:
        raise UserError(
            f"{body.path} is of base model {checkpoint.base_model!r}, this run of {run.base_model!r}"
        )
    optimizer = _wants_optimizer(body, checkpoint.has_optimizer)
    return await submit_load(gateway, run, turn, checkpoint, optimizer=optimizer)


async def _begin_at(
    gateway: Gateway, session: Session, model_seq_id: int, body: schemas.LoadWeights, digest: bytes
) -> Future:
    requests.require_adamw(body.optimizer_config)
    request_id = request_id_of(run_id_of(session.session_id, model_seq_id), Turn(0))
    begun = await gateway.store.futures.get(request_id)
    if (
        begun is not None
    ):  # sent again; the checkpoint may have gone meanwhile, the run has begun all the same
        require_same(begun, "create_run", digest)
        return begun
    token_owner = await gateway.keys.owner_of(body.weights_access_token)
    checkpoint = await loadable_checkpoint(gateway.store, session.owner, body.path, also_of=token_owner)
    if body.base_model is not None and body.base_model != checkpoint.base_model:
        raise BadRequest(
            f"base_model is {body.base_model!r}, but {body.path} is of {checkpoint.base_model!r}",
            param="base_model",
        )
    new = NewRun(
        session,
        model_seq_id,
        checkpoint.base_model,
        LoraSpec(**checkpoint.lora),
        body.user_metadata or {},
        digest,
        origin=checkpoint,
        with_optimizer=_wants_optimizer(body, checkpoint.has_optimizer),
    )
    return await submit_run(gateway, new)


def _wants_optimizer(body: schemas.LoadWeights, has_optimizer: bool) -> bool:
    if body.optimizer and not has_optimizer:
        raise BadRequest(
            f"{body.path} was saved for sampling and has no optimizer state; load it without, or load one "
            "that save_state has made",
            param="optimizer",
        )
    return bool(body.optimizer)


@router.post("/weights_info", openapi_extra=takes(schemas.WeightsInfo))
async def weights_info(request: Request, owner: Owner, gateway: Running) -> Response:
    """What a checkpoint is of."""
    body = await json_body(request, schemas.WeightsInfo)
    checkpoint = await readable_checkpoint(gateway.store, owner, body.tinker_path, param="tinker_path")
    lora = checkpoint.lora
    return json_reply(
        {
            "base_model": checkpoint.base_model,
            "is_lora": True,
            "lora_rank": lora["rank"],
            "train_unembed": lora["train_unembed"],
            "train_mlp": lora["train_mlp"],
            "train_attn": lora["train_attn"],
            "optimizer_config": {"type": "adamw"},
        }
    )
