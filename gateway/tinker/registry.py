"""Training runs and checkpoints, as the REST client and the `tinker` command line list and change them."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response

from gateway.auth import Owner, Who
from gateway.checkpoints import checkpoint_path, delete_checkpoint, owned_checkpoint
from gateway.errors import NotFound
from gateway.state import Gateway, Running
from gateway.store.records import Checkpoint, CheckpointKind, Run, RunStatus
from gateway.tinker import schemas
from gateway.tinker.edge import json_body, json_reply, moment, takes
from gateway.tinker.routing import topic
from gateway.tinker.session_registry import Scope, whose
from gateway.tinker.texts import texts_of

router = topic()

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=10**9)]

_WIRE_TYPE = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}
_FIRST_WITH_EXTERNAL = (0, 30)
_BEFORE_EXTERNAL = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)


async def listed_kinds(
    x_stainless_package_version: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Collection[CheckpointKind]:
    """Kinds of checkpoints that the caller's SDK knows: one that it does not know breaks its whole list."""
    known = re.match(r"(\d+)\.(\d+)", x_stainless_package_version or "")
    old = known is not None and (int(known[1]), int(known[2])) < _FIRST_WITH_EXTERNAL
    return _BEFORE_EXTERNAL if old else tuple(CheckpointKind)


Kinds = Annotated[Collection[CheckpointKind], Depends(listed_kinds)]


@router.get("/training_runs")
async def list_training_runs(
    caller: Who,
    gateway: Running,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
    project_id: Annotated[str | None, Query(max_length=1_000)] = None,
) -> dict[str, Any]:
    """Runs, newest first."""
    owner = whose(caller, access_scope)
    runs = await gateway.store.runs.page(
        limit=limit, offset=offset, where={"owner": owner}, project_id=project_id
    )
    total = await gateway.store.runs.count(owner, project_id)
    cursor = {"offset": offset, "limit": limit, "total_count": total}
    return {"training_runs": await _runs_json(gateway, runs), "cursor": cursor}


@router.get("/training_runs/{run_id}")
async def get_training_run(
    run_id: str, caller: Who, gateway: Running, access_scope: Scope = "owned"
) -> dict[str, Any]:
    """One run."""
    run = await gateway.store.runs.get(run_id) if "\0" not in run_id else None
    if run is None or whose(caller, access_scope) not in (None, run.owner):
        raise NotFound(f"there is no run {run_id!r}", param="model_id")
    return (await _runs_json(gateway, [run]))[0]


@router.get("/models/{run_id}/checkpoints", name="list_checkpoints_of_old_sdks")
@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(run_id: str, owner: Owner, gateway: Running, kinds: Kinds) -> dict[str, Any]:
    """All checkpoints of a run, newest first."""
    await gateway.run(owner, run_id)
    checkpoints = await gateway.store.checkpoints.page(
        limit=100_000, where={"owner": owner, "run_id": run_id}, kinds=kinds
    )
    return {"checkpoints": [_checkpoint_json(checkpoint) for checkpoint in checkpoints]}


@router.get("/checkpoints")
async def list_user_checkpoints(
    owner: Owner, gateway: Running, kinds: Kinds, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """The caller's checkpoints, newest first."""
    checkpoints = await gateway.store.checkpoints.page(
        limit=limit, offset=offset, where={"owner": owner}, kinds=kinds
    )
    total = await gateway.store.checkpoints.count(owner, kinds)
    cursor = {"offset": offset, "limit": limit, "total_count": total}
    return {"checkpoints": [_checkpoint_json(checkpoint) for checkpoint in checkpoints], "cursor": cursor}


@router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
async def publish_checkpoint(run_id: str, kind: str, name: str, owner: Owner, gateway: Running) -> Response:
    """Let everybody load a checkpoint. Repeating it changes nothing."""
    checkpoint = await _owned(gateway, owner, run_id, kind, name)
    await gateway.store.checkpoints.set_public(checkpoint.path, True)
    return json_reply({})


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
async def unpublish_checkpoint(run_id: str, kind: str, name: str, owner: Owner, gateway: Running) -> Response:
    """Only the owner may load it again. Repeating it changes nothing."""
    checkpoint = await _owned(gateway, owner, run_id, kind, name)
    await gateway.store.checkpoints.set_public(checkpoint.path, False)
    return json_reply({})


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl", openapi_extra=takes(schemas.SetTtl))
async def set_checkpoint_ttl(
    request: Request, run_id: str, kind: str, name: str, owner: Owner, gateway: Running
) -> Response:
    """Let a checkpoint expire that many seconds from now; null keeps it."""
    body = await json_body(request, schemas.SetTtl)
    checkpoint = await _owned(gateway, owner, run_id, kind, name)
    expires_at = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    await gateway.store.checkpoints.set_expiry(checkpoint.path, expires_at)
    return json_reply({})


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
async def remove_checkpoint(run_id: str, kind: str, name: str, owner: Owner, gateway: Running) -> Response:
    """Delete a checkpoint; runs that began at it, and samplers made from it, are not affected."""
    checkpoint = await _owned(gateway, owner, run_id, kind, name)
    await delete_checkpoint(gateway.store, gateway.settings, checkpoint.path)
    return json_reply({})


async def _owned(gateway: Gateway, owner: str, run_id: str, kind: str, name: str) -> Checkpoint:
    if kind not in set(CheckpointKind):
        raise NotFound(f"there is no checkpoint {kind}/{name} of run {run_id}")
    return await owned_checkpoint(gateway.store, owner, checkpoint_path(run_id, CheckpointKind(kind), name))


async def _runs_json(gateway: Gateway, runs: list[Run]) -> list[dict[str, Any]]:
    latest = await gateway.store.checkpoints.latest_of_runs([run.run_id for run in runs])
    return [_run_json(run, latest) for run in runs]


def _run_json(run: Run, latest: dict[tuple[str, str], Checkpoint]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": run.owner,
        "is_lora": True,
        "lora_rank": run.lora["rank"],
        "corrupted": run.status is RunStatus.FAILED,
        "last_request_time": moment(run.last_request_at),
        "user_metadata": texts_of(run.user_metadata),
    }
    for field, kind in (
        ("last_checkpoint", CheckpointKind.TRAINING),
        ("last_sampler_checkpoint", CheckpointKind.SAMPLER),
    ):
        checkpoint = latest.get((run.run_id, kind))
        if checkpoint is not None:
            body[field] = _checkpoint_json(checkpoint)
    return body


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    body: dict[str, Any] = {
        "checkpoint_id": checkpoint.checkpoint_id,
        "checkpoint_type": _WIRE_TYPE[checkpoint.kind],
        "time": moment(checkpoint.created_at),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
    }
    if checkpoint.expires_at is not None:
        body["expires_at"] = moment(checkpoint.expires_at)
    return body
