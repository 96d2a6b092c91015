"""Where snapshots lie in the long run: with all that is stored, or where a URL of their own says.

An engine writes to its storage, and reads from there. With a `snapshot_url` the files are moved to it before a snapshot
is registered, and brought back before one is restored. There need be no renaming there: what has not been registered
counts for nothing, and the engine compares every file with its checksum before it uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from engines.distant_folders import DistantFolders
from engines.storage import SNAPSHOTS, FolderStorage
from gateway.errors import ConfigurationError
from gateway.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_FETCHES = 2
"""Snapshots that are brought at a time, for runs that wait to be restored."""
_THREADS = 8
"""Apart from those that requests are worked on in: when a storage is silent, these all wait for it."""
_DATABASE_DIGITS = 16


class SnapshotsUnreachable(Exception):
    """The files cannot be written or read where the settings say. Clients may see the message: it has only the id under
    which the log says why."""


class SnapshotFiles:
    """The files of snapshots by their storage keys."""

    def __init__(self, settings: Settings) -> None:
        self._local = settings.storage_dir
        self._elsewhere = DistantFolders(settings.snapshot_url) if settings.snapshot_url else None
        self._kept = FolderStorage(settings.storage_dir, settings.snapshot_url or settings.storage_url)
        self.fetches = asyncio.Semaphore(_FETCHES)
        self._threads = ThreadPoolExecutor(_THREADS, "snapshots")

    @property
    def distant(self) -> bool:
        """Whether a snapshot has to be brought before an engine can read it."""
        return self._elsewhere is not None

    @staticmethod
    def new_key(database: bytes) -> str:
        """A storage key that no snapshot has. Those of each database, which `database` identifies, lie apart: what one
        of them does not know of may be another's."""
        return f"{_below(database)}/{secrets.token_hex(16)}"

    async def keep(self, key: str) -> None:
        """See that what an engine has written stays. Raises SnapshotsUnreachable, and then the key holds nothing."""
        if self._elsewhere is not None:
            try:
                await self._try(partial(self._elsewhere.push, key, self._place(key)))
            finally:
                await asyncio.to_thread(shutil.rmtree, self._place(key), ignore_errors=True)

    async def bring(self, key: str) -> None:
        """Have the files in the engines' storage folder, as far as they exist, unless engines bring them by themselves;
        then only see that these can. Raises SnapshotsUnreachable."""
        if self._elsewhere is not None:
            await self._try(partial(self._download, self._elsewhere, key))
        else:
            await self._try(self._kept.owner)

    async def put_away(self, key: str) -> None:
        """After `bring`: they are not needed there any more."""
        if self._elsewhere is not None:
            await asyncio.to_thread(shutil.rmtree, self._place(key), ignore_errors=True)

    async def remove(self, key: str) -> None:
        """Remove a snapshot that is not registered; what cannot be removed now is found again later."""
        try:
            await self._try(partial(self._remove, key))
        except SnapshotsUnreachable as error:
            log.warning("snapshot %s is removed later: %s", key, error)

    async def put_away_older_than(self, seconds: float, database: bytes) -> int:
        """The same for what was brought, or was about to be moved, by a process that has died since; how many."""
        if self._elsewhere is None:
            return 0
        here = FolderStorage(self._local)
        keys = await asyncio.to_thread(here.older_than, _below(database), time.time() - seconds)
        for key in keys:
            await self.put_away(key)
        return len(keys)

    async def older_than(self, seconds: float, database: bytes) -> list[str]:
        """Keys of everything that was written so long ago for a database. Raises SnapshotsUnreachable."""
        return await self._try(partial(self._kept.older_than, _below(database), time.time() - seconds))

    # ------------------------------------------------------------------ in a worker thread

    def _place(self, key: str) -> Path:
        return self._local / key

    def _download(self, elsewhere: DistantFolders, key: str) -> None:
        """Under another name first: a thread whose caller has gone on writes nothing where somebody reads."""
        place = self._place(key)
        shutil.rmtree(place, ignore_errors=True)
        coming = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
        coming.mkdir(parents=True)
        elsewhere.pull(key, coming)  # the engine says which files are missing
        try:
            coming.rename(place)
        except OSError:  # somebody else has brought the same meanwhile
            shutil.rmtree(coming)

    def _remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._kept.remove(key)

    async def _try(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            error_id = secrets.token_hex(6)
            log.error("error %s: the storage of snapshots: %s", error_id, error)
            raise SnapshotsUnreachable(
                f"the storage of snapshots cannot be reached; the log has more under {error_id}"
            ) from error


def _below(database: bytes) -> str:
    return f"{SNAPSHOTS}/{database.hex()[:_DATABASE_DIGITS]}"


def check_place(settings: Settings) -> None:
    """See that snapshots, and what else is stored, can go where the settings say. Raises ConfigurationError."""
    for name in ("snapshot_url", "storage_url"):
        if url := getattr(settings, name):
            _check_url(name, url)


def _check_url(name: str, url: str) -> None:
    protocol = url.partition("://")[0]  # what follows may hold credentials
    try:
        DistantFolders(url).check()
    except ImportError as error:
        raise ConfigurationError(f"{name} begins with {protocol!r}: {error}") from None
    except ValueError:
        raise ConfigurationError(
            f"{name} begins with {protocol!r}; it must be a URL of a kind that fsspec knows, such as s3://bucket"
        ) from None
