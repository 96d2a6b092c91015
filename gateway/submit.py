"""Accepting calls, whatever dialect they came in: what is checked, drawn and recorded before an id is answered.

Everything here is neutral: operations and sample requests of `engines.operations`, records of the store.
"""

from __future__ import annotations

import secrets
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engines.operations import (
    AdapterRef,
    CreateRun,
    Forward,
    ForwardBackward,
    LoadWeights,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SaveWeights,
    encode,
)
from gateway.checkpoints import checkpoint_path, require_space
from gateway.errors import BadRequest, Gone
from gateway.fleet import Needs
from gateway.sealing import plain_folder
from gateway.state import Gateway
from gateway.store.futures import Submission
from gateway.store.records import (
    Checkpoint,
    CheckpointKind,
    Future,
    FutureStatus,
    Reference,
    Run,
    RunStatus,
    Sampler,
    Session,
)
from gateway.turns import Turn, request_id_of

RunOperation = ForwardBackward | Forward | OptimStep

KIND_OF: dict[type, str] = {
    ForwardBackward: "forward_backward",
    Forward: "forward",
    OptimStep: "optim_step",
}


@dataclass(frozen=True, slots=True)
class NewRun:
    """What a client asks for when it begins a run; `origin` is the checkpoint that it begins at."""

    session: Session
    model_seq_id: int
    base_model: str
    lora: LoraSpec
    user_metadata: dict[str, Any]
    digest: bytes
    """Of what was sent."""
    origin: Checkpoint | None = None
    with_optimizer: bool = False


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Weights to save under a name (`name` set) or as an unnamed sampler (`sampler_id` set), which may be one that
    follows the run (`inflight`)."""

    kind: CheckpointKind
    name: str | None = None
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    sampler_id: str | None = None
    session_id: str | None = None
    inflight: bool = False
    recipients: tuple[str, ...] = ()
    """Of external weights: the age recipients that its files are encrypted for; none: they are not."""


def draw_seed() -> int:
    """A seed for a request that brings none, drawn once and stored with it."""
    return secrets.randbits(63)


def run_id_of(session_id: str, model_seq_id: int) -> str:
    """The id that the SDK computes by itself; never another."""
    return f"{session_id}:train:{model_seq_id}"


def sampler_id_of(session_id: str, sampling_session_seq_id: int) -> str:
    """The id of a session's n-th sampler."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def closed_session(owner: str, name: str, sdk_version: str = "", **more: Any) -> Session:
    """A session of the server's own making, for what belongs to no client's connection; it is over at once."""
    now = time.time()
    values: dict[str, Any] = {
        "session_id": str(uuid.uuid4()),
        "owner": owner,
        "idempotency_key": None,
        "user_metadata": {},
        "tags": [],
        "sdk_version": sdk_version,
        "project_id": None,
        "display_name": name,
        "created_at": now,
        "heartbeat_at": now,
        "finished_at": now,
        "finish_reason": "success",
    }
    return Session(**{**values, **more})


def storage_run(session: Session, base_model: str, engine: str, lora: dict[str, Any]) -> Run:
    """The first run of a session, made to hold a checkpoint; it is never trained."""
    now = time.time()
    return Run(
        run_id=run_id_of(session.session_id, 0),
        owner=session.owner,
        session_id=session.session_id,
        model_seq_id=0,
        engine=engine,
        base_model=base_model,
        lora=lora,
        optimizer="adamw",
        origin_path=None,
        origin_folder=None,
        user_metadata={},
        created_at=now,
        last_request_at=now,
        status=RunStatus.STORAGE,
    )


async def submit_run(gateway: Gateway, new: NewRun) -> Future:
    """Begin a run; its creation is slot 0 of its log.

    Raises NotFound when its base model is not trained here, or the checkpoint it begins at has gone meanwhile, and
    ModelNotLoadable.
    """
    supervisor = gateway.fleet.for_base_model(new.base_model, "train").supervisor
    engine = supervisor.engine
    origin_folder = new.origin.folder if new.origin is not None else None
    now = time.time()
    run = Run(
        run_id=run_id_of(new.session.session_id, new.model_seq_id),
        owner=new.session.owner,
        session_id=new.session.session_id,
        model_seq_id=new.model_seq_id,
        engine=engine.name,
        base_model=new.base_model,
        lora=lora_json(new.lora),
        optimizer="adamw",
        origin_path=new.origin.path if new.origin is not None else None,
        origin_folder=origin_folder,
        user_metadata=new.user_metadata,
        created_at=now,
        last_request_at=now,
    )
    body = encode(CreateRun(new.lora, folder=origin_folder, optimizer_state=new.with_optimizer))
    future = _future(run, Turn(0, digest=new.digest), "create_run", {"path": run.origin_path}, None)
    future = replace(future, input_bytes=len(body))
    if not gateway.futures.knows(future.request_id):
        supervisor.require_loadable()
        await gateway.dispatcher_of(run).require_room(future)
    needs = new.origin.reference if new.origin is not None else None
    await gateway.futures.submit(Submission(future, body, run, needs))
    return future


async def submit_operation(gateway: Gateway, run: Run, turn: Turn, operation: RunOperation) -> Future:
    """Append an operation to a run's log. Raises BadRequest and TooManyRequests."""
    future = _future(run, turn, KIND_OF[type(operation)], {}, None)
    return await _append(gateway, run, future, encode(operation))


async def submit_load(
    gateway: Gateway, run: Run, turn: Turn, checkpoint: Checkpoint, *, optimizer: bool
) -> Future:
    """Append the loading of a checkpoint; the log keeps its files from now on. Raises NotFound when it has gone."""
    operation = LoadWeights(checkpoint.folder, optimizer_state=optimizer)
    future = _future(run, turn, "load_weights", {"path": checkpoint.path}, checkpoint.folder)
    return await _append(gateway, run, future, encode(operation), checkpoint.reference)


async def submit_save(gateway: Gateway, run: Run, turn: Turn, save: SaveRequest) -> Future:
    """Append a save. The folder that it will write to is decided here, so that a repetition writes to the same.

    Raises BadRequest when its owner's checkpoints and unnamed weights have used up their bytes.
    """
    folder = f"checkpoints/{secrets.token_hex(16)}"
    with_optimizer = save.kind is CheckpointKind.TRAINING
    context: dict[str, Any] = {}
    if save.name is not None:
        context["checkpoint"] = {
            "path": checkpoint_path(run.run_id, save.kind, save.name),
            "kind": save.kind,
            "name": save.name,
            "base_model": run.base_model,
            "lora": run.lora,
            "has_optimizer": with_optimizer,
            "user_metadata": save.user_metadata or {},
            "ttl_seconds": save.ttl_seconds,
            "overwrite": save.overwrite,
        }
        if save.recipients:
            context["checkpoint"]["recipients"] = save.recipients
    if save.sampler_id is not None:
        context["sampler"] = {
            "sampler_id": save.sampler_id,
            "session_id": save.session_id,
            "engine": gateway.fleet.to_sample(run.base_model, Needs.of(run.lora)).name,
            "base_model": run.base_model,
            "inflight": save.inflight,
        }
    written_to = plain_folder(folder) if save.recipients else folder
    operation = SaveWeights(written_to, optimizer_state=with_optimizer)
    future = _future(run, turn, "save_weights", context, folder)
    if not gateway.futures.knows(future.request_id):
        overwrites = save.overwrite and save.name is not None
        replacing = checkpoint_path(run.run_id, save.kind, save.name or "") if overwrites else None
        await require_space(gateway.store, gateway.settings, run.owner, replacing=replacing)
    return await _append(gateway, run, future, encode(operation))


async def submit_rejection(gateway: Gateway, run: Run, turn: Turn, kind: str, message: str) -> Future:
    """Record an operation that cannot be performed as failed: its sender learns why, and its number is consumed."""
    failed = _rejected(_future(run, turn, kind, {}, None), message)
    return await _append(gateway, run, failed, b"")


async def submit_sample(gateway: Gateway, sampler: Sampler, turn: Turn, request: SampleRequest) -> Future:
    """Accept a sample, with the weights that it will be drawn from, also when it has to be drawn again after a crash.

    Raises TooManyRequests when too many of its owner's wait already, and ModelNotLoadable.
    """
    needs = Needs.of(await gateway.lora_of(sampler.run_id), request)
    folder = await weights_of(gateway, sampler)
    adapter = None if folder is None else AdapterRef(folder, folder)
    request = msgspec.structs.replace(request, adapter=adapter, session=sampler.sampler_id)
    dispatcher = gateway.fleet.route(sampler.base_model, needs, request)
    body = encode(request)
    future = replace(_sample_future(sampler, dispatcher.name, turn), input_bytes=len(body))
    with dispatcher.expecting():  # until it stands in its queue
        if not gateway.futures.knows(future.request_id):
            dispatcher.supervisor.require_loadable()
            await dispatcher.require_room(future)
        await gateway.futures.submit(Submission(future, body))
    if folder is not None:
        gateway.store.samplers.sampled(sampler.sampler_id)
    return future


async def weights_of(gateway: Gateway, sampler: Sampler) -> str | None:
    """The folder that a sampler samples now: its own, or the newest inflight one of its run. Raises Gone when it is not
    kept any more."""
    sampled = sampler
    if sampler.inflight_seq is not None and sampler.run_id is not None:
        sampled = await gateway.store.samplers.newest_inflight(sampler.run_id) or sampler
    if sampled.released_at is not None:
        if sampled.path is not None:
            why = f"{sampled.path} has been deleted, and their session has ended"
        else:
            why = "they were saved without a name, and their session has ended or newer ones have long replaced them"
        raise Gone(
            f"the weights of {sampler.sampler_id} are not kept any more: {why}; save them under a name to keep them",
            param="sampling_session_id",
        )
    return sampled.folder


async def submit_rejected_sample(gateway: Gateway, sampler: Sampler, turn: Turn, message: str) -> Future:
    """Record a sample that cannot be served as failed."""
    failed = _rejected(_sample_future(sampler, sampler.engine, turn), message)
    await gateway.futures.submit(Submission(failed, b""))
    return failed


async def _append(
    gateway: Gateway, run: Run, future: Future, body: bytes, needs: Reference | None = None
) -> Future:
    if future.seq_id < 1:
        raise BadRequest(
            f"seq_id is {future.seq_id}; operations of a run are numbered from 1", param="seq_id"
        )
    future = replace(future, input_bytes=len(body))
    if not gateway.futures.knows(future.request_id):
        await gateway.dispatcher_of(run).require_room(future)
    await gateway.futures.submit(Submission(future, body, needs=needs))
    return future


def _future(run: Run, turn: Turn, kind: str, context: dict[str, Any], folder: str | None) -> Future:
    return Future(
        request_id=request_id_of(run.run_id, turn),
        owner=run.owner,
        engine=run.engine,
        kind=kind,
        seq_id=turn.number,
        created_at=time.time(),
        digest=turn.digest,
        run_id=run.run_id,
        context=context,
        folder=folder,
    )


def _rejected(future: Future, message: str) -> Future:
    """A future that has failed already. A message may repeat a name of the sender's; PostgreSQL holds no NUL."""
    return replace(
        future,
        status=FutureStatus.FAILED,
        error=message.replace("\0", "\\0"),
        error_category="user",
        finished_at=time.time(),
    )


def _sample_future(sampler: Sampler, engine: str, turn: Turn) -> Future:
    return Future(
        request_id=request_id_of(sampler.sampler_id, turn),
        owner=sampler.owner,
        engine=engine,
        kind="sample",
        seq_id=turn.number,
        created_at=time.time(),
        digest=turn.digest,
        sampler_id=sampler.sampler_id,
    )


def lora_json(lora: LoraSpec) -> dict[str, Any]:
    """An adapter's configuration as records keep it, with every field."""
    return {name: getattr(lora, name) for name in lora.__struct_fields__}
