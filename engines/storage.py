"""Stored folders by key: either complete and synced, or not there at all.

A key is a relative path such as `checkpoints/0f3a`, decided when an operation is accepted. A folder is written once.
Only a save that was cut short may come again with its key; nobody has been told of the first one, so it is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engines.interface import UserError

CHECKSUMS = "checksums.json"
"""Beside saved weights: the SHA-256, hex, of each file by its name."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_RANDOM = "[0-9a-f]" * 32
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class FolderStorage:
    """Folders below `root`, which is made when the first one is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, key: str) -> Path:
        """Where a key lies, whether it exists or not.

        Segments are letters, digits, dots, dashes and underscores and do not begin with a dot: no key leads out of
        the root or to a folder that is still being written. Raises ValueError otherwise.
        """
        if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
            raise ValueError(
                f"storage key {key!r}: its segments, separated by '/', consist of letters, digits, '.', '-' and '_' "
                "and do not begin with '.'"
            )
        return self.root.joinpath(*key.split("/"))

    @contextmanager
    def write(self, key: str) -> Iterator[Path]:
        """A new, empty folder to fill. It appears under its key, synced, when the block ends without an error.

        On an error nothing of it is left. What killed processes have left of the same key is removed.
        """
        target = self.path(key)
        _make_synced(target.parent)
        for stale in target.parent.glob(f".{target.name}.{_RANDOM}.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = _sibling(target)
        partial.mkdir()
        try:
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                _sync(path)
            _sync(partial)
            _move(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)

    def open(self, key: str, *names: str) -> Path:
        """The folder of a key, which holds files of the given names. Raises UserError naming what is missing."""
        folder = self.path(key)
        if not folder.is_dir():
            raise UserError(
                f"there is nothing stored under {key}; it has been deleted, or its save did not finish"
            )
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{key} holds no {name}")
        return folder

    @staticmethod
    def size(folder: Path) -> int:
        """Bytes of all files in a folder, its checksums apart."""
        files = (path for path in folder.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if path.name != CHECKSUMS)


def write_folder(root: str | Path, key: str, files: Mapping[str, bytes]) -> int:
    """Store files by name under a key, sealed, complete and synced; gives the bytes written, its checksums apart."""
    with FolderStorage(root).write(key) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        seal(folder)
    return sum(len(data) for data in files.values())


def open_folder(root: str | Path, key: str, *names: str) -> Path:
    """The folder of a key, with files of the given names in it. Raises UserError naming what is missing."""
    return FolderStorage(root).open(key, *names)


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256, hex, of each file of a folder by its name."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def seal(folder: Path) -> None:
    """Write beside the files of a folder what their SHA-256 are: the last thing that is done to saved weights before
    they appear under their key. `engines.saved_weights` compares."""
    (folder / CHECKSUMS).write_bytes(msgspec.json.encode(checksums(folder)))


def verify(root: str | Path, key: str, expected: Mapping[str, str]) -> None:
    """See that a folder holds the files that were written to it. Raises UserError naming what is missing or differs."""
    folder = open_folder(root, key, *expected)
    for name, wanted in expected.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise UserError(f"{name} in {key} cannot be read: {error.strerror}") from error
        if found != wanted:
            raise UserError(
                f"{name} in {key} is not what was written: its SHA-256 is {found}, it was {wanted}"
            )


def sha256_of(path: Path) -> str:
    """Of a file's contents, hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(target: Path) -> Path:
    """An unused hidden name beside the target, on the same file system."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")


def _move(partial: Path, target: Path) -> None:
    """Rename the folder to its place. A folder cannot be renamed onto a full one, so that one is moved away first."""
    while True:
        try:
            partial.rename(target)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        old = _sibling(target)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _make_synced(folder: Path) -> None:
    """Make a folder and those above it; the entry of each new one is synced too."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
