"""Copies of checkpoints: another name, owner and expiry for the same stored files."""

from __future__ import annotations

import time
from dataclasses import replace

from fastapi import Request, Response

from gateway.auth import Owner
from gateway.checkpoints import checkpoint_path, loadable_checkpoint, require_space
from gateway.errors import BadRequest
from gateway.state import Gateway, Running
from gateway.store.deposits import Deposit
from gateway.store.records import Checkpoint, Session
from gateway.submit import closed_session, run_id_of, storage_run
from gateway.tinker import schemas
from gateway.tinker.edge import idempotency_key, json_body, json_reply, takes
from gateway.tinker.routing import topic

router = topic()


@router.post("/copy_weights", openapi_extra=takes(schemas.CopyWeights))
async def copy_weights(request: Request, owner: Owner, gateway: Running) -> Response:
    """A checkpoint of the caller's own with the files of one that they can read, in a run made to hold it.

    No bytes are copied. A repetition with the same X-Idempotency-Key, or of the same session_id and model_seq_id, is
    answered with the first copy.
    """
    body = await json_body(request, schemas.CopyWeights)
    token = request.headers.get("x-tinker-weights-access-token", body.weights_access_token)
    session = await _destination(request, gateway, owner, body)
    run_id = run_id_of(session.session_id, body.model_seq_id or 0)
    made_before = await gateway.store.checkpoints.page(limit=1, where={"run_id": run_id})
    if (
        made_before and body.session_id is None
    ):  # the source may have gone meanwhile, the copy is there all the same
        return json_reply({"tinker_path": made_before[0].path})
    if not made_before:
        await require_space(gateway.store, gateway.settings, owner)
    token_owner = await gateway.keys.owner_of(token)
    source = await loadable_checkpoint(
        gateway.store, owner, body.source_path, param="source_path", also_of=token_owner
    )
    stored = await gateway.store.deposits.add(await _copy(gateway, source, session, run_id, body))
    return json_reply({"tinker_path": stored.checkpoint.path})


async def _destination(request: Request, gateway: Gateway, owner: str, body: schemas.CopyWeights) -> Session:
    """The session that the copy's run belongs to: the one that is named, or one for this copy, in a project."""
    given = [each is not None for each in (body.session_id, body.model_seq_id, body.destination_project_id)]
    if given not in ([True, True, False], [False, False, True]):
        raise BadRequest(
            "give either destination_project_id, or session_id and model_seq_id",
            param="destination_project_id",
        )
    if body.session_id is not None:
        return await gateway.live_session(owner, body.session_id)
    key = idempotency_key(request)
    kept_under = None if key is None else f"copy_weights {key}"
    earlier = await gateway.store.sessions.of_key(owner, kept_under) if kept_under is not None else None
    version = request.headers.get("x-stainless-package-version", "")[:100]
    project = body.destination_project_id
    return earlier or closed_session(owner, "copy", version, project_id=project, idempotency_key=kept_under)


async def _copy(
    gateway: Gateway, source: Checkpoint, session: Session, run_id: str, body: schemas.CopyWeights
) -> Deposit:
    """The same files, under the name that they have in their own run; only the expiry is the copy's own."""
    now = time.time()
    checkpoint = replace(
        source,
        path=checkpoint_path(run_id, source.kind, source.name),
        owner=session.owner,
        run_id=run_id,
        public=False,
        created_at=now,
        expires_at=None if body.ttl_seconds is None else now + body.ttl_seconds,
    )
    origin = await gateway.store.runs.get(source.run_id)
    assert origin is not None
    run = replace(
        storage_run(session, source.base_model, origin.engine, source.lora),
        run_id=run_id,
        model_seq_id=body.model_seq_id or 0,
        origin_path=source.path,
    )
    return Deposit(checkpoint, run, None if body.session_id is not None else session, source.reference)
