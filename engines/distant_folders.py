"""Stored folders where a URL of fsspec's says, `s3://bucket/prefix` say: copied there whole, and from there.

There need be no renaming: a folder is named by nobody before all of it is there, and written once. fsspec, and what it
needs for the URL, are imported when they are used: most engines have their storage on a disk.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    import fsspec


class StorageUnreachable(OSError):
    """The storage at the URL cannot be written or read. The message is for the log; it holds no credentials."""


class DistantFolders:
    """Folders by their keys, below a URL. What fails raises StorageUnreachable."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def push(self, key: str, folder: Path) -> None:
        """Copy the files of a folder there. The one that is there is written over, file by file."""
        with self._reached() as (files, root):
            for path in sorted(folder.iterdir()):
                there = f"{root}/{key}/{path.name}"
                _put(files, there, partial(files.put_file, str(path), there))

    def pull(self, key: str, folder: Path) -> bool:
        """Copy the files of a key into a folder; whether there are any."""
        with self._reached() as (files, root):
            files.invalidate_cache()
            try:
                found = files.ls(f"{root}/{key}", detail=False)
            except FileNotFoundError:
                return False
            for path in found:
                files.get_file(path, str(folder / path.rpartition("/")[2]))
            return bool(found)

    def remove(self, key: str) -> None:
        """Remove the files of a key, if there are any."""
        with self._reached() as (files, root), contextlib.suppress(FileNotFoundError):
            files.rm(f"{root}/{key}", recursive=True)

    def older_than(self, below: str, moment: float) -> list[str]:
        """Keys of the folders in the folder `below` of which no file was written since a moment, in seconds since 1970:
        a storage of objects has no folders that would know."""
        found: dict[str, float] = {}
        with self._reached() as (files, root):
            files.invalidate_cache()
            for path in files.find(f"{root}/{below}"):
                key = f"{below}/{path.removeprefix(f'{root}/{below}/').partition('/')[0]}"
                found[key] = max(found.get(key, 0.0), files.modified(path).timestamp())
        return [key for key, written in found.items() if written < moment]

    def read(self, name: str) -> bytes | None:
        """What a file holds; None: it is not there."""
        with self._reached() as (files, root):
            try:
                content: bytes = files.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        """Have a file hold this."""
        with self._reached() as (files, root):
            there = f"{root}/{name}"
            _put(files, there, partial(files.pipe_file, there, content))

    def check(self) -> None:
        """Raises ImportError or ValueError when the URL is of no kind that is known here."""
        import fsspec  # late: see above

        fsspec.url_to_fs(self._url)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
        """The file system of the URL, and the path of the URL in it."""
        import fsspec  # late: see above

        try:
            files, root = fsspec.url_to_fs(self._url)
            yield files, root.rstrip("/")
        except (
            Exception
        ) as error:  # boundary: each file system of fsspec has errors of its own; callers get ours
            why = self._without_credentials(f"{type(error).__name__}: {error}")
            raise StorageUnreachable(why) from None  # what it comes from may tell a password

    def _without_credentials(self, text: str) -> str:
        """Somebody else's error, in which the URL, or the part of it that names a user, may be repeated."""
        place, _, query = self._url.partition("://")[2].partition("?")
        user, at, _ = place.partition("/")[0].rpartition("@")
        password = user.partition(":")[2]
        values = [field.partition("=")[2] for field in query.split("&")]
        for secret in (query, user + at, password, unquote(password), *values, *map(unquote, values)):
            text = text.replace(secret, "***") if secret else text
        return text


def without_credentials(url: str) -> str:
    """Where a URL leads, for people: no user, no password, and no query, which may hold a signature."""
    protocol, separator, place = url.partition("?")[0].rpartition("://")
    host, slash, path = place.partition("/")
    return f"{protocol}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _put(files: fsspec.AbstractFileSystem, there: str, put: Callable[[], object]) -> None:
    """Put a file there. In a file system of real folders, whose paths begin at a root, its folder may have to be made
    first; a bucket is not made."""
    try:
        put()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) or error.errno == errno.ENOENT
        if not missing or not there.startswith("/"):
            raise
        files.makedirs(there.rpartition("/")[0], exist_ok=True)
        put()
