"""Where snapshots lie in the long run: in the engines' storage folder, or where a URL of fsspec's says.

An engine writes to its own folder, and reads from there. With a URL the files are moved to it before a snapshot is
registered, and brought back before one is restored. There need be no renaming there: what has not been registered
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
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import fsspec

from gateway.errors import ConfigurationError
from gateway.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_FETCHES = 2
"""Snapshots that are brought at a time, for runs that wait to be restored."""
_THREADS = 8
"""Apart from those that requests are worked on in: when a storage is silent, these all wait for it."""
_FOLDER = "snapshots"
_DATABASE_DIGITS = 16


class SnapshotsUnreachable(Exception):
    """The files cannot be written or read where the settings say. Clients may see the message: it has only the id under
    which the log says why."""


class SnapshotFiles:
    """The files of snapshots by their storage keys."""

    def __init__(self, settings: Settings) -> None:
        self._local = settings.storage_dir
        self._url = settings.snapshot_url.rstrip("/")
        self.fetches = asyncio.Semaphore(_FETCHES)
        self._threads = ThreadPoolExecutor(_THREADS, "snapshots")

    @property
    def distant(self) -> bool:
        """Whether a snapshot has to be brought before an engine can read it."""
        return bool(self._url)

    @staticmethod
    def new_key(database: bytes) -> str:
        """A storage key that no snapshot has. Those of each database, which `database` identifies, lie apart: what one
        of them does not know of may be another's."""
        return f"{_below(database)}/{secrets.token_hex(16)}"

    async def keep(self, key: str) -> None:
        """See that what an engine has written stays. Raises SnapshotsUnreachable, and then the key holds nothing."""
        if self._url:
            try:
                await self._try(lambda: self._upload(key))
            finally:
                await asyncio.to_thread(shutil.rmtree, self._place(key), ignore_errors=True)

    async def bring(self, key: str) -> None:
        """Have the files in the engines' storage folder, as far as they exist. Raises SnapshotsUnreachable."""
        if self._url:
            await self._try(lambda: self._download(key))

    async def put_away(self, key: str) -> None:
        """After `bring`: they are not needed there any more."""
        if self._url:
            await asyncio.to_thread(shutil.rmtree, self._place(key), ignore_errors=True)

    async def remove(self, key: str) -> None:
        """Remove a snapshot that is not registered; what cannot be removed now is found again later."""
        try:
            await self._try(lambda: self._remove(key))
        except SnapshotsUnreachable as error:
            log.warning("snapshot %s is removed later: %s", key, error)

    async def put_away_older_than(self, seconds: float, database: bytes) -> int:
        """The same for what was brought, or was about to be moved, by a process that has died since; how many."""
        if not self._url:
            return 0
        keys = await asyncio.to_thread(
            _older_than, *self._own_disk(), time.time() - seconds, _below(database)
        )
        for key in keys:
            await self.put_away(key)
        return len(keys)

    async def older_than(self, seconds: float, database: bytes) -> list[str]:
        """Keys of everything that was written so long ago for a database. Raises SnapshotsUnreachable."""
        return await self._try(lambda: self._older_than(time.time() - seconds, _below(database)))

    # ------------------------------------------------------------------ in a worker thread

    def _place(self, key: str) -> Path:
        return self._local / key

    def _remote(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system of the URL, and the path of the URL in it."""
        files, root = fsspec.url_to_fs(self._url)
        return files, root.rstrip("/")

    def _upload(self, key: str) -> None:
        files, root = self._remote()
        for path in sorted(self._place(key).iterdir()):
            files.put_file(str(path), f"{root}/{key}/{path.name}")

    def _download(self, key: str) -> None:
        """Under another name first: a thread whose caller has gone on writes nothing where somebody reads."""
        files, root = self._remote()
        place = self._place(key)
        shutil.rmtree(place, ignore_errors=True)
        coming = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
        coming.mkdir(parents=True)
        files.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):  # the engine says which files are missing
            for path in files.ls(f"{root}/{key}", detail=False):
                files.get_file(path, str(coming / path.rpartition("/")[2]))
        try:
            coming.rename(place)
        except OSError:  # somebody else has brought the same meanwhile
            shutil.rmtree(coming)

    def _remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._url:
                files, root = self._remote()
                files.rm(f"{root}/{key}", recursive=True)
            else:
                shutil.rmtree(self._place(key))

    def _own_disk(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return fsspec.filesystem("file"), str(self._local.resolve())

    def _older_than(self, moment: float, below: str) -> list[str]:
        return _older_than(*(self._remote() if self._url else self._own_disk()), moment, below)

    async def _try(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (
            Exception
        ) as error:  # boundary: each file system of fsspec has errors of its own; callers get ours
            error_id = secrets.token_hex(6)
            why = f"{type(error).__name__}: {error}"
            log.error("error %s: the storage of snapshots: %s", error_id, self._without_credentials(why))
            raise SnapshotsUnreachable(
                f"the storage of snapshots cannot be reached; the log has more under {error_id}"
            ) from error

    def _without_credentials(self, text: str) -> str:
        """Somebody else's error, in which the URL, or the part of it that names a user, may be repeated."""
        user, at, _ = self._url.partition("://")[2].partition("/")[0].rpartition("@")
        password = user.partition(":")[2]
        for secret in (user + at, password, unquote(password)):
            text = text.replace(secret, "***") if secret else text
        return text


def _older_than(files: fsspec.AbstractFileSystem, root: str, moment: float, below: str) -> list[str]:
    """Keys by the newest file of each, for a file system of objects has no folders."""
    files.invalidate_cache()
    found: dict[str, float] = {}
    for path in files.find(f"{root}/{below}"):
        key = f"{below}/{path.removeprefix(f'{root}/{below}/').partition('/')[0]}"
        found[key] = max(found.get(key, 0.0), files.modified(path).timestamp())
    return [key for key, written in found.items() if written < moment]


def _below(database: bytes) -> str:
    return f"{_FOLDER}/{database.hex()[:_DATABASE_DIGITS]}"


def check_place(settings: Settings) -> None:
    """See that snapshots can go where the settings say. Raises ConfigurationError."""
    if not settings.snapshot_url:
        return
    protocol = settings.snapshot_url.partition("://")[0]  # what follows may hold credentials
    try:
        fsspec.url_to_fs(settings.snapshot_url)
    except ImportError as error:
        raise ConfigurationError(f"snapshot_url begins with {protocol!r}: {error}") from None
    except ValueError:
        raise ConfigurationError(
            f"snapshot_url begins with {protocol!r}; it must be a URL of a kind that fsspec knows, such as s3://bucket"
        ) from None
