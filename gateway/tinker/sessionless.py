"""Sessions and samplers that a client does not ask for, because its SDK (up to 0.2) does not know them."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass

from fastapi import Request

from gateway.checkpoints import loadable_checkpoint
from gateway.errors import BadRequest
from gateway.fleet import Needs
from gateway.state import Gateway
from gateway.store.records import Reference, Sampler, Session
from gateway.tinker.edge import idempotency_key


@dataclass(frozen=True, slots=True)
class Weights:
    """What is to be sampled: a base model, alone or with the adapter of a checkpoint."""

    base_model: str
    path: str | None = None
    run_id: str | None = None
    reference: Reference | None = None


async def session_of_run(request: Request, gateway: Gateway, owner: str, session_id: str | None) -> Session:
    """The session that a run is to belong to; without one, a session of its own. A retry gets the same one."""
    if session_id is not None:
        return await gateway.live_session(owner, session_id)
    key = idempotency_key(request)
    version = request.headers.get("x-stainless-package-version", "")[:100]
    session = _session(str(uuid.uuid4()), owner, f"create_model {key}" if key is not None else None, version)
    return await gateway.store.sessions.create(session)


async def sessionless_sampler(
    gateway: Gateway, owner: str, base_model: str | None, model_path: str | None
) -> Sampler:
    """The sampler of an owner for what a sample names; there is one for the same weights."""
    weights = await weights_to_sample(gateway, owner, base_model, model_path)
    folder = weights.reference.folder if weights.reference is not None else ""
    named = "\0".join((owner, weights.base_model, weights.path or "", folder))
    session_id = f"sessionless-{hashlib.sha256(named.encode()).hexdigest()[:32]}"
    sampler_id = f"{session_id}:sample:0"
    sampler = await gateway.known_samplers.get(sampler_id)
    if sampler is None:
        session = await gateway.store.sessions.create(_session(session_id, owner, None, ""))
        await store_sampler(gateway, session, sampler_id, weights)
        sampler = await gateway.sampler(owner, sampler_id)
    return sampler


async def weights_to_sample(
    gateway: Gateway, owner: str, base_model: str | None, model_path: str | None
) -> Weights:
    """Weights that an owner may sample. Raises BadRequest and NotFound."""
    if model_path is not None:
        checkpoint = await loadable_checkpoint(gateway.store, owner, model_path, param="model_path")
        if base_model is not None and base_model != checkpoint.base_model:
            raise BadRequest(
                f"base_model is {base_model!r}, but {model_path} is of {checkpoint.base_model!r}",
                param="base_model",
            )
        return Weights(checkpoint.base_model, model_path, checkpoint.run_id, checkpoint.reference)
    if base_model is None:
        raise BadRequest("give base_model or model_path", param="base_model")
    return Weights(base_model)


async def store_sampler(gateway: Gateway, session: Session, sampler_id: str, weights: Weights) -> None:
    """Make a sampler; it never changes. Raises NotFound when its model is not served or its checkpoint has gone,
    and ModelNotLoadable."""
    needs = Needs.of(await gateway.lora_of(weights.run_id))
    supervisor = gateway.fleet.to_sample(weights.base_model, needs).supervisor
    supervisor.require_loadable()
    engine = supervisor.engine
    sampler = Sampler(
        sampler_id=sampler_id,
        owner=session.owner,
        session_id=session.session_id,
        engine=engine.name,
        base_model=weights.base_model,
        run_id=weights.run_id,
        path=weights.path,
        folder=weights.reference.folder if weights.reference is not None else None,
        created_at=time.time(),
    )
    await gateway.store.samplers.create(sampler)


def _session(session_id: str, owner: str, key: str | None, sdk_version: str) -> Session:
    now = time.time()
    return Session(
        session_id=session_id,
        owner=owner,
        idempotency_key=key,
        user_metadata={},
        tags=[],
        sdk_version=sdk_version,
        project_id=None,
        display_name=None,
        created_at=now,
        heartbeat_at=now,
    )
