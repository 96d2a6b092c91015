"""Finding checkpoints by their tinker:// paths, for those who may use them, and freeing what nothing refers to."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from gateway.errors import BadRequest, NotFound
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.records import Checkpoint, CheckpointKind

log = logging.getLogger(__name__)

SCHEME = "tinker://"


def checkpoint_path(run_id: str, kind: CheckpointKind, name: str) -> str:
    """The path under which a checkpoint is known to its owner."""
    return f"{SCHEME}{run_id}/{kind}/{name}"


def parse_path(path: str, *, param: str = "path") -> tuple[str, CheckpointKind, str]:
    """Run, kind and name of a tinker:// path. Raises BadRequest."""
    segments = path.removeprefix(SCHEME).split("/")
    kinds = {str(kind) for kind in CheckpointKind}
    if (
        not path.startswith(SCHEME)
        or len(segments) != 3
        or not all(segments)
        or segments[1] not in kinds
        or "\0" in path
    ):
        raise BadRequest(
            f"{param} is {path[:200]!r}; a checkpoint's path is tinker://RUN/KIND/NAME, KIND one of "
            f"{', '.join(sorted(kinds))}",
            param=param,
        )
    return segments[0], CheckpointKind(segments[1]), segments[2]


async def readable_checkpoint(store: Store, owner: str, path: str, *, param: str = "path") -> Checkpoint:
    """A checkpoint that an owner may load: their own, or one that is public. Raises BadRequest and NotFound."""
    parse_path(path, param=param)
    checkpoint = await store.checkpoints.get(path)
    if checkpoint is None or (checkpoint.owner != owner and not checkpoint.public):
        raise NotFound(f"there is no checkpoint {path}", param=param)
    return checkpoint


async def owned_checkpoint(store: Store, owner: str, path: str, *, param: str = "path") -> Checkpoint:
    """A checkpoint that an owner may change. Raises BadRequest and NotFound."""
    checkpoint = await readable_checkpoint(store, owner, path, param=param)
    if checkpoint.owner != owner:
        raise NotFound(f"there is no checkpoint {path}", param=param)
    return checkpoint


async def delete_checkpoint(store: Store, settings: Settings, path: str) -> None:
    """Delete a checkpoint; its files go when no log and no sampler needs them any more."""
    folder = await store.checkpoints.delete(path)
    if folder is not None:
        await remove_folder(settings, folder)


class FolderRemovals:
    """Folders that have become useless by an operation's outcome, removed behind the scenes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def append(self, folder: str) -> None:
        """Remove a folder soon; nobody waits for it."""
        task = asyncio.create_task(remove_folder(self._settings, folder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Finish what has begun."""
        await asyncio.gather(*self._tasks)


async def remove_folder(settings: Settings, folder: str) -> None:
    """Remove a stored folder that nothing refers to."""
    place = settings.storage_dir / Path(folder)
    try:
        await asyncio.to_thread(shutil.rmtree, place)
    except FileNotFoundError:
        log.info("folder %s was gone already", folder)
    except OSError as error:
        log.error("folder %s could not be removed: %s", folder, error)
