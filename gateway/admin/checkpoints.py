"""Checkpoints: listed, brought from outside, deleted one by one or by what they are; samplers that get a name."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gateway.admin import views
from gateway.admin.cursors import decode_cursor, next_cursor
from gateway.admin.imports import Wanted, import_adapter
from gateway.admin.scope import Cursor, Filter, Limit, OwnerFilter, scope, visible
from gateway.auth import Caller, Who
from gateway.checkpoints import checkpoint_path, delete_checkpoint, remove_folder, require_name, require_space
from gateway.errors import BadRequest, NotFound, UnsupportedMediaType
from gateway.queries import KnownQueryRoute
from gateway.state import Gateway, Running
from gateway.store.checkpoints import Selection
from gateway.store.deposits import Deposit
from gateway.store.records import Checkpoint, CheckpointKind, Run, Sampler
from gateway.submit import weights_of

router = APIRouter(prefix="/admin/v1", tags=["admin"], route_class=KnownQueryRoute)

_AT_A_TIME = 100
_TAR = "application/x-tar"
_SHORTEST_TTL_S, _LONGEST_TTL_S = 3600, 10 * 366 * 86400

Ttl = Annotated[int | None, Query(ge=_SHORTEST_TTL_S, le=_LONGEST_TTL_S, description="seconds; none: kept")]
Moment = Annotated[datetime | None, Query(description="ISO 8601 with its zone")]


@router.get("/checkpoints")
async def list_checkpoints(
    caller: Who,
    gateway: Running,
    limit: Limit = 100,
    cursor: Cursor = None,
    owner: OwnerFilter = None,
    run_id: Filter = None,
    kind: CheckpointKind | None = None,
    base_model: Filter = None,
) -> views.Page[views.CheckpointView]:
    """Checkpoints, newest first."""
    filters = {"owner": scope(caller, owner), "run_id": run_id, "kind": kind, "base_model": base_model}
    rows = await gateway.store.checkpoints.page(limit=limit, before=decode_cursor(cursor), where=filters)
    items = [views.checkpoint_view(row) for row in rows]
    return views.Page(
        items=items, next_cursor=next_cursor(rows, limit, lambda row: (row.created_at, row.path))
    )


@router.post(
    "/checkpoints",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {_TAR: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_checkpoint(
    request: Request,
    caller: Who,
    gateway: Running,
    base_model: Annotated[str, Query(max_length=300, description="the name under which it is served")],
    name: Annotated[str, Query(max_length=200, description="of the checkpoint")],
    ttl_seconds: Ttl = None,
) -> views.ImportView:
    """A checkpoint of an adapter that was trained elsewhere.

    The body is an uncompressed tar of PEFT's `adapter_config.json` and `adapter_model.safetensors`.
    """
    _require_name(name)
    media_type = request.headers.get("content-type", _TAR).partition(";")[0].strip().lower()
    if media_type not in (_TAR, "application/octet-stream") or "content-encoding" in request.headers:
        raise UnsupportedMediaType(f"the body is to be an uncompressed tar, Content-Type {_TAR}")
    wanted = Wanted(base_model, name, ttl_seconds)
    checkpoint, imported = await import_adapter(gateway, caller.owner, request.stream(), wanted)
    return views.ImportView(
        checkpoint=views.checkpoint_view(checkpoint), layers=imported.layers, zero_layers=imported.zero_layers
    )


@router.delete("/checkpoints")
async def delete_checkpoints(
    caller: Who,
    gateway: Running,
    dry_run: Annotated[bool, Query(description="only say which")] = False,
    owner: OwnerFilter = None,
    run_id: Filter = None,
    kind: CheckpointKind | None = None,
    base_model: Filter = None,
    name_prefix: Annotated[str | None, Query(max_length=200, description="how their names begin")] = None,
    before: Moment = None,
    after: Moment = None,
    keep_last: Annotated[
        int, Query(ge=0, le=10**6, description="the newest so many of each run and kind stay")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000, description="the oldest so many of them")] = 1000,
) -> views.DeletionView:
    """Delete checkpoints by what they are; at least one filter besides `owner` is needed."""
    for moment in (before, after):
        if moment is not None and moment.tzinfo is None:
            raise BadRequest(
                f"{moment.isoformat()} has no time zone; write it with one, 2026-01-31T12:00:00Z"
            )
    if not (run_id or kind or base_model or name_prefix or before or after or keep_last):
        raise BadRequest(
            "give at least one of run_id, kind, base_model, name_prefix, before, after, keep_last; "
            "nothing was deleted"
        )
    selection = Selection(
        owner=scope(caller, owner),
        run_id=run_id,
        kind=kind,
        base_model=base_model,
        name_prefix=name_prefix or "",
        after=None if after is None else after.timestamp(),
        before=None if before is None else before.timestamp(),
        keep_last=keep_last,
    )
    found = await gateway.store.checkpoints.select(selection, limit + 1)
    chosen = found[:limit]
    if not dry_run:
        await _delete_all(gateway, chosen)
    return views.DeletionView(
        dry_run=dry_run,
        paths=[each.path for each in chosen],
        size_bytes=sum(each.size_bytes for each in chosen),
        more=len(found) > len(chosen),
    )


async def _delete_all(gateway: Gateway, chosen: list[Checkpoint]) -> None:
    """Some at a time, so that others' writes come in between."""
    for start in range(0, len(chosen), _AT_A_TIME):
        part = chosen[start : start + _AT_A_TIME]
        folders = await asyncio.gather(*(gateway.store.checkpoints.delete(each.path) for each in part))
        for folder in folders:
            if folder is not None:
                await remove_folder(gateway.settings, folder)


@router.get("/checkpoints/{run_id}/{kind}/{name}")
async def get_checkpoint(
    run_id: str, kind: CheckpointKind, name: str, caller: Who, gateway: Running
) -> views.CheckpointView:
    """One checkpoint."""
    return views.checkpoint_view(await _checkpoint(gateway, caller, run_id, kind, name))


@router.delete("/checkpoints/{run_id}/{kind}/{name}", status_code=204)
async def remove_checkpoint(
    run_id: str, kind: CheckpointKind, name: str, caller: Who, gateway: Running
) -> Response:
    """Delete a checkpoint. Runs that began at it and samplers made from it are not affected."""
    checkpoint = await _checkpoint(gateway, caller, run_id, kind, name)
    await delete_checkpoint(gateway.store, gateway.settings, checkpoint.path)
    return Response(status_code=204)


@router.get("/samplers")
async def list_samplers(
    caller: Who,
    gateway: Running,
    limit: Limit = 100,
    cursor: Cursor = None,
    owner: OwnerFilter = None,
    session_id: Filter = None,
    run_id: Filter = None,
) -> views.Page[views.SamplerView]:
    """Samplers, newest first."""
    filters = {"owner": scope(caller, owner), "session_id": session_id, "run_id": run_id}
    rows = await gateway.store.samplers.page(limit=limit, before=decode_cursor(cursor), where=filters)
    items = [views.sampler_view(row) for row in rows]
    position = next_cursor(rows, limit, lambda row: (row.created_at, row.sampler_id))
    return views.Page(items=items, next_cursor=position)


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, caller: Who, gateway: Running) -> views.SamplerView:
    """One sampler."""
    return views.sampler_view(await sampler_of_caller(gateway, caller, sampler_id))


@router.post("/samplers/{sampler_id}/promote", status_code=201)
async def promote_sampler(
    sampler_id: str, wanted: views.Promotion, caller: Who, gateway: Running
) -> views.CheckpointView:
    """A checkpoint, with a name, of the weights that an unnamed sampler samples now. It shares the sampler's files.

    Repeating it with the same name sets the expiry anew.
    """
    _require_name(wanted.name)
    sampler = await sampler_of_caller(gateway, caller, sampler_id)
    run = await _run_of(gateway, sampler)
    path = checkpoint_path(run.run_id, CheckpointKind.SAMPLER, wanted.name)
    folder = await weights_of(gateway, sampler) or ""
    await require_space(gateway.store, gateway.settings, sampler.owner, replacing=path, naming=folder)
    size = await asyncio.to_thread(_size, gateway, folder)
    now = time.time()
    checkpoint = Checkpoint(
        path=path,
        owner=sampler.owner,
        run_id=run.run_id,
        kind=CheckpointKind.SAMPLER,
        name=wanted.name,
        folder=folder,
        base_model=sampler.base_model,
        lora=run.lora,
        has_optimizer=False,
        size_bytes=size,
        public=False,
        user_metadata={},
        created_at=now,
        expires_at=None if wanted.ttl_seconds is None else now + wanted.ttl_seconds,
    )
    stored = await gateway.store.deposits.add(Deposit(checkpoint))
    if stored.orphaned_folder is not None:
        await remove_folder(gateway.settings, stored.orphaned_folder)
    return views.checkpoint_view(stored.checkpoint)


def _size(gateway: Gateway, folder: str) -> int:
    storage = gateway.settings.storage
    return storage.size(storage.open(folder))


async def _run_of(gateway: Gateway, sampler: Sampler) -> Run:
    """The run whose weights a sampler has, if a checkpoint of it may be made. Raises BadRequest."""
    if sampler.folder is None or sampler.run_id is None:
        raise BadRequest(
            f"sampler {sampler.sampler_id} is of the base model alone; there are no weights to name"
        )
    if sampler.path is not None:
        raise BadRequest(
            f"sampler {sampler.sampler_id} was made from the checkpoint {sampler.path}; only unnamed weights get a name"
        )
    run = await gateway.store.runs.get(sampler.run_id)
    assert run is not None
    return run


async def _checkpoint(
    gateway: Gateway, caller: Caller, run_id: str, kind: CheckpointKind, name: str
) -> Checkpoint:
    path = checkpoint_path(run_id, kind, name)
    checkpoint = await gateway.store.checkpoints.get(path)
    if checkpoint is None or not visible(caller, checkpoint.owner):
        raise NotFound(f"there is no checkpoint {path}")
    return checkpoint


async def sampler_of_caller(gateway: Gateway, caller: Caller, sampler_id: str) -> Sampler:
    """A sampler that a caller may see. Raises NotFound."""
    sampler = await gateway.store.samplers.get(sampler_id)
    if sampler is None or not visible(caller, sampler.owner):
        raise NotFound(f"there is no sampler {sampler_id!r}")
    return sampler


def _require_name(name: str) -> None:
    try:
        require_name("name", name)
    except ValueError as error:
        raise BadRequest(str(error), param="name") from error
