"""Finding checkpoints by their tinker:// paths, for those who may use them, and freeing what nothing refers to."""

from __future__ import annotations

import asyncio
import logging
import re

from gateway.errors import BadRequest, NotFound
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.records import Checkpoint, CheckpointKind

log = logging.getLogger(__name__)

SCHEME = "tinker://"
_SWEPT_AT_A_TIME = 100
_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._=+@-]{1,200}")
_ECHO = 80


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


async def readable_checkpoint(
    store: Store, owner: str, path: str, *, param: str = "path", also_of: str | None = None
) -> Checkpoint:
    """A checkpoint that an owner may read: their own, a public one, or one of the owner `also_of`, whose access token
    came with the request. Raises BadRequest and NotFound."""
    parse_path(path, param=param)
    checkpoint = await store.checkpoints.get(path)
    if checkpoint is None or not (checkpoint.owner in (owner, also_of) or checkpoint.public):
        raise NotFound(f"there is no checkpoint {path}", param=param)
    return checkpoint


def require_name(field: str, name: str) -> None:
    """See that a name fits into a tinker:// path. Raises ValueError with a sentence, which in a struct's
    `__post_init__` becomes part of the decoder's error."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field} is {name[:_ECHO]!r}; the name of a checkpoint is 1 to 200 letters, digits or characters of "
            "._=+@- and neither . nor .."
        )


async def loadable_checkpoint(
    store: Store, owner: str, path: str, *, param: str = "path", also_of: str | None = None
) -> Checkpoint:
    """A readable checkpoint that an engine can load or sample. Raises BadRequest and NotFound."""
    checkpoint = await readable_checkpoint(store, owner, path, param=param, also_of=also_of)
    if checkpoint.kind is CheckpointKind.EXTERNAL:
        raise BadRequest(
            f"{path} holds files for downloading, possibly encrypted; load or sample a checkpoint of its run in "
            f"{CheckpointKind.TRAINING} or {CheckpointKind.SAMPLER}",
            param=param,
        )
    return checkpoint


async def owned_checkpoint(store: Store, owner: str, path: str, *, param: str = "path") -> Checkpoint:
    """A checkpoint that an owner may change. Raises BadRequest and NotFound."""
    checkpoint = await readable_checkpoint(store, owner, path, param=param)
    if checkpoint.owner != owner:
        raise NotFound(f"there is no checkpoint {path}", param=param)
    return checkpoint


async def require_space(
    store: Store,
    settings: Settings,
    owner: str,
    *,
    replacing: str | None = None,
    naming: str | None = None,
) -> None:
    """Raises BadRequest when an owner's checkpoints and weights without a name have used up the bytes that they may
    have. What is stored under the path `replacing`, and unnamed weights in the folder `naming`, are left out. What is
    being saved at the same time is not counted yet."""
    used, most = await store.checkpoints.bytes_of(owner, naming), settings.max_checkpoint_bytes
    if used >= most and replacing is not None and (old := await store.checkpoints.get(replacing)) is not None:
        used -= old.size_bytes
    if used >= most:
        raise BadRequest(
            f"your checkpoints, and weights that samplers have without one, have {used} bytes, and an owner's may have "
            f"{most} (setting max_checkpoint_bytes): delete some, save with ttl_seconds, or end sessions whose "
            f"samplers nobody needs: their weights go {settings.unnamed_retention_s:.0f} s later"
        )


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


async def delete_expired(store: Store, settings: Settings) -> int:
    """Delete all that have expired, some at a time; until then they are only hidden. How many there were."""
    total = 0
    while True:
        found, folders = await store.checkpoints.delete_expired(_SWEPT_AT_A_TIME)
        total += found
        for folder in folders:
            await remove_folder(settings, folder)
        if found < _SWEPT_AT_A_TIME:
            return total


async def remove_folder(settings: Settings, folder: str) -> None:
    """Remove a stored folder that nothing refers to."""
    try:
        await asyncio.to_thread(settings.storage.remove, folder)
    except FileNotFoundError:
        log.info("folder %s was gone already", folder)
    except OSError as error:
        log.error("folder %s could not be removed: %s", folder, error)
