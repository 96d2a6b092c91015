"""Bringing an adapter from outside: receive a tar, check it, store it, register it as a checkpoint."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engines.interface import EngineInfo
from engines.storage import seal
from gateway.adapter_files import Imported, rewrite_adapter
from gateway.bodies import patience
from gateway.checkpoints import checkpoint_path, remove_folder, require_space
from gateway.errors import BadRequest, EngineUnavailable, PayloadTooLarge
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.store.deposits import Deposit
from gateway.store.records import Checkpoint, CheckpointKind
from gateway.submit import closed_session, lora_json, storage_run
from gateway.supervisor import Supervisor
from gateway.uploads import unpack_files

_LARGEST_CONFIG = 1 << 20
_DRAINED = 2
"""So many times the limit is read of a body that is too large: most clients read an answer only when all is sent."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the adapter is to become: a checkpoint of this name, for this base model."""

    base_model: str
    name: str
    ttl_seconds: int | None


async def import_adapter(
    gateway: Gateway, owner: str, body: AsyncIterator[bytes], wanted: Wanted
) -> tuple[Checkpoint, Imported]:
    """The checkpoint, with weights alone, and what was found. Raises UserError, BadRequest, PayloadTooLarge,
    NotFound, ModelNotLoadable, NoRoom, and EngineUnavailable until the engine has told its layers."""
    engine = gateway.fleet.for_base_model(wanted.base_model, "train").supervisor
    info = _info(engine, wanted.base_model)
    await require_space(gateway.store, gateway.settings, owner)
    folder = f"checkpoints/{secrets.token_hex(16)}"
    async with gateway.importing, _removed_unless_kept(gateway.settings, folder) as kept:
        with scratch_folder(gateway.settings) as scratch:
            await _receive(body, scratch / "upload.tar", gateway.settings.max_import_bytes)
            imported = await asyncio.to_thread(_store, gateway.settings, scratch, folder, info)
        checkpoint = await _register(gateway, owner, folder, imported, wanted, engine.engine.name)
        kept.append(folder)
    return checkpoint, imported


def _info(engine: Supervisor, base_model: str) -> EngineInfo:
    info = engine.info
    if info is None:
        engine.require_loadable()
        raise EngineUnavailable(f"the engine of {base_model} is {engine.described}; try again in a moment")
    if not info.layers:
        raise BadRequest(
            f"the engine of {base_model} does not tell its layers, so nothing can be checked against them",
            param="base_model",
        )
    return info


async def _receive(body: AsyncIterator[bytes], target: Path, limit: int) -> None:
    """Raises PayloadTooLarge, and NoRoom when it comes too slowly: few can be received at a time."""
    size = 0
    with target.open("wb") as file:
        async with patience(limit) as heard:
            async for chunk in body:
                heard()
                size += len(chunk)
                if size <= limit:
                    await asyncio.to_thread(file.write, chunk)
                elif size > _DRAINED * limit:
                    break
    if size > limit:
        raise PayloadTooLarge(f"the body is larger than {limit} bytes (setting max_import_bytes)")


def _store(settings: Settings, scratch: Path, folder: str, info: EngineInfo) -> Imported:
    limits = {ADAPTER_CONFIG: _LARGEST_CONFIG, ADAPTER_WEIGHTS: settings.max_import_bytes}
    with (scratch / "upload.tar").open("rb") as archive:
        unpack_files(archive, scratch, limits)
    with settings.storage.write(folder) as target:
        imported = rewrite_adapter(scratch, target, info)
        seal(target)
    return imported


async def _register(
    gateway: Gateway, owner: str, folder: str, imported: Imported, wanted: Wanted, engine: str
) -> Checkpoint:
    now = time.time()
    session = closed_session(owner, "import")
    run = storage_run(session, wanted.base_model, engine, lora_json(imported.lora))
    checkpoint = Checkpoint(
        path=checkpoint_path(run.run_id, CheckpointKind.TRAINING, wanted.name),
        owner=owner,
        run_id=run.run_id,
        kind=CheckpointKind.TRAINING,
        name=wanted.name,
        folder=folder,
        base_model=wanted.base_model,
        lora=run.lora,
        has_optimizer=False,
        size_bytes=imported.size_bytes,
        public=False,
        user_metadata={},
        created_at=now,
        expires_at=None if wanted.ttl_seconds is None else now + wanted.ttl_seconds,
    )
    return (await gateway.store.deposits.add(Deposit(checkpoint, run, session))).checkpoint


@asynccontextmanager
async def _removed_unless_kept(settings: Settings, folder: str) -> AsyncIterator[list[str]]:
    """Remove a stored folder at the end, unless it has been put into the list."""
    kept: list[str] = []
    try:
        yield kept
    finally:
        if folder not in kept:
            await remove_folder(settings, folder)


@contextmanager
def scratch_folder(settings: Settings) -> Iterator[Path]:
    """A folder for what is being received; a killed process leaves it, and it is removed after a day."""
    root = settings.data_dir / "uploads"
    root.mkdir(exist_ok=True)
    for stale in root.iterdir():
        if time.time() - stale.stat().st_mtime > 86_400:
            shutil.rmtree(stale, ignore_errors=True)
    folder = root / secrets.token_hex(16)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
