"""A checkpoint's files as they are downloaded: one by one, or together as a tar that is made while it is sent."""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from engines.adapters import OPTIMIZER
from engines.interface import UserError
from engines.storage import CHECKSUMS, FolderStorage
from gateway.errors import NotFound
from gateway.settings import Settings
from gateway.store.records import Checkpoint

_CHUNK = 1 << 20
_COMPLETE = "checkpoint_complete"
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a checkpoint; stored folders hold no folders."""

    name: str
    path: Path
    size: int


async def files_of(settings: Settings, checkpoint: Checkpoint) -> list[StoredFile]:
    """What users get of a checkpoint, by name: the adapter in PEFT's layout, not the optimizer's state and not the
    server's checksums.

    Raises NotFound when its folder is gone.
    """
    return await asyncio.to_thread(_list, settings.storage, checkpoint)


def _list(storage: FolderStorage, checkpoint: Checkpoint) -> list[StoredFile]:
    try:
        folder = storage.open(checkpoint.folder)
    except UserError as error:
        raise NotFound(f"the files of {checkpoint.path} are gone") from error
    kept_back = (OPTIMIZER, CHECKSUMS)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in kept_back)
    return [StoredFile(path.name, path, path.stat().st_size) for path in paths]


class Tar:
    """The files as a tar (USTAR; base-256 sizes above 8 GiB), the same bytes each time; `modified_at` is in seconds.

    `size` is known before anything is read. The last member is an empty file that says that all others are there: the
    command line of SDKs 0.10 to 0.34 refuses to publish what lacks it.
    """

    def __init__(self, files: list[StoredFile], modified_at: float) -> None:
        self._files = [*files, StoredFile(_COMPLETE, Path(os.devnull), 0)]
        self._modified_at = int(modified_at)
        self.size = len(_END) + sum(
            tarfile.BLOCKSIZE + each.size + _padding(each.size) for each in self._files
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """All bytes in order. Raises OSError when a file has become shorter or is gone."""
        for each in self._files:
            yield self._header(each)
            async for chunk in _contents(each):
                yield chunk
            yield bytes(_padding(each.size))
        yield _END

    def _header(self, each: StoredFile) -> bytes:
        entry = tarfile.TarInfo(each.name)
        entry.size = each.size
        entry.mtime = self._modified_at
        return entry.tobuf(tarfile.GNU_FORMAT)


async def _contents(each: StoredFile) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(each.path.open, "rb")
    try:
        left = each.size
        while left:
            chunk = await asyncio.to_thread(file.read, min(left, _CHUNK))
            if not chunk:
                raise OSError(f"{each.path} ends {left} bytes early")
            left -= len(chunk)
            yield chunk
    finally:
        file.close()


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
