"""Stored folders by key: either complete and synced, or not there at all.

With a URL they are stored where it says, and a folder of this machine holds copies of what was written or used lately.

A key is a relative path such as `checkpoints/0f3a`, decided when an operation is accepted. A folder is written once.
Only a save that was cut short may come again with its key; nobody has been told of the first one, so it is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from engines.distant_folders import DistantFolders
from engines.interface import EngineConfig, UserError

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""Beside saved weights: the SHA-256, hex, of each file by its name."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_RANDOM = "[0-9a-f]" * 32
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
UNUSED_S = 3600.0
"""Seconds after which a copy of what is stored elsewhere goes, if nobody has used it."""
_IN_USE_S = 600.0
"""Seconds for which a copy that was used stays, however much there is."""
_SHARE = 4
"""Copies may have the disk's bytes divided by this."""
_LOOK_S = 300.0
"""Seconds between two looks for copies that nobody uses."""
SNAPSHOTS = "snapshots"
"""What keys of snapshots begin with."""
PLAIN = ".plain"
"""What keys of files end with that are there to be encrypted by somebody else."""
MARK = ".database"
"""Beside stored folders: whose they are."""
_PROBE = ".probe/written-by-engines"
"""Below a folder, as all files of stored folders are."""


class FolderStorage:
    """Folders below `root`, which is made when the first one is written; with a `url` they are stored there, and `root`
    has copies. What cannot be reached raises an OSError."""

    def __init__(self, root: str | Path, url: str = "") -> None:
        self.root = Path(root)
        self._distant = DistantFolders(url) if url else None

    @classmethod
    def of(cls, config: EngineConfig) -> FolderStorage:
        """An engine's."""
        return cls(config.storage, config.storage_url)

    def check(self) -> None:
        """See that there can be written to where a URL says. Raises ImportError, ValueError and OSError."""
        if self._distant is not None:
            self._distant.check()
            self._distant.write(_PROBE, b"")

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
            if self._distant is not None:
                self._distant.push(key, partial)
            if self._distant is not None and _read_elsewhere(key):
                shutil.rmtree(partial, ignore_errors=True)  # no copy
                self.drop_copy(key)  # of a save that was cut short
            else:
                _move(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)
        self.drop_unused()

    def bring(self, key: str) -> Path:
        """Where the folder of a key is on this machine now, if it is stored. What is there is not changed: what is
        stored under a key stays the same."""
        folder = self.path(key)
        if self._distant is None:
            return folder
        with suppress(FileNotFoundError):
            os.utime(folder)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        coming = _sibling(folder)
        coming.mkdir()
        try:
            if self._distant.pull(key, coming):
                for path in coming.iterdir():
                    _sync(path)  # no loss of power may leave a copy with files cut short
                coming.rename(folder)
        except OSError as error:
            if error.errno not in _TAKEN:  # else somebody else has brought the same meanwhile
                raise
        finally:
            shutil.rmtree(coming, ignore_errors=True)
        self.drop_unused()
        return folder

    def drop_copy(self, key: str) -> bool:
        """Remove what this machine has of a key, if it is stored elsewhere; whether there was anything."""
        return self._distant is not None and _remove_whole(self.path(key))

    def remove(self, key: str) -> None:
        """Remove what is stored under a key, or what was left half written. Raises FileNotFoundError when there is
        nothing, unless it is stored elsewhere."""
        if self._distant is not None:
            _remove_whole(self.root / key)
            self._distant.remove(key)
        else:
            shutil.rmtree(self.root / key)

    def older_than(self, below: str, moment: float) -> list[str]:
        """Keys of the folders in the folder `below` that nobody has written to since a moment, in seconds since 1970;
        those too that are half written."""
        if self._distant is not None:
            return self._distant.older_than(below, moment)
        folder = self.root / below
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(
            f"{below}/{path.name}" for path in found if path.is_dir() and _written_at(path) < moment
        )

    def owner(self) -> str:
        """Whose folders these are, as `claim` has said it; empty: nobody has."""
        if self._distant is not None:
            return (self._distant.read(MARK) or b"").decode(errors="replace")
        mark = self.root / MARK
        return mark.read_text() if mark.exists() else ""

    def claim(self, owner: str) -> None:
        """Say whose folders these are."""
        if self._distant is not None:
            self._distant.write(MARK, owner.encode())
        else:
            (self.root / MARK).write_text(owner)

    def open(self, key: str, *names: str) -> Path:
        """The folder of a key, which holds files of the given names. Raises UserError naming what is missing."""
        folder = self.bring(key)
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

    def drop_unused(self) -> int:
        """Remove copies that nobody has used for an hour, and what was left half written; of the others those that were
        used longest ago, while they take more than a quarter of the disk. Gives how many."""
        if self._distant is None or not self.root.is_dir():
            return 0
        left, now, dropped = _bytes_for_copies(self.root), time.time(), 0
        for path, used_at in sorted(self._copies().items(), key=lambda each: -each[1]):
            unused_s, half = now - used_at, path.name.startswith(".")
            left -= _bytes_of(path)
            if unused_s > UNUSED_S or (left < 0 and unused_s > _IN_USE_S and not half):
                dropped += _remove_whole(path)
        return dropped

    def watch_copies(self, every_s: float = _LOOK_S) -> threading.Event:
        """`drop_unused` now and then, in a thread, until the event is set or the process ends."""
        end = threading.Event()

        def watch() -> None:
            while True:
                try:
                    self.drop_unused()
                except OSError as error:
                    log.warning("copies in %s: %s", self.root, error)
                if end.wait(every_s):
                    return

        if self._distant is not None:
            threading.Thread(target=watch, name="copies", daemon=True).start()
        return end

    def _copies(self) -> dict[Path, float]:
        """The folders that hold files, or are half written, and when each was used last."""
        found = ((Path(place), files) for place, folders, files in os.walk(self.root) if not folders)
        return {
            path: _written_at(path)
            for path, files in found
            if path != self.root and (files or path.name.startswith("."))
        }


def write_folder(storage: FolderStorage, key: str, files: Mapping[str, bytes]) -> int:
    """Store files by name under a key, sealed, complete and synced; gives the bytes written, its checksums apart."""
    with storage.write(key) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        seal(folder)
    return sum(len(data) for data in files.values())


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256, hex, of each file of a folder by its name."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def seal(folder: Path) -> None:
    """Write beside the files of a folder what their SHA-256 are: the last thing that is done to saved weights before
    they appear under their key. `engines.saved_weights` compares."""
    (folder / CHECKSUMS).write_bytes(msgspec.json.encode(checksums(folder)))


def verify(storage: FolderStorage, key: str, expected: Mapping[str, str]) -> None:
    """See that a folder holds the files that were written to it; a copy that does not is brought anew. Raises UserError
    naming what is missing or differs."""
    try:
        _verify(storage, key, expected)
    except UserError:
        if not storage.drop_copy(key):
            raise
        _verify(storage, key, expected)


def _verify(storage: FolderStorage, key: str, expected: Mapping[str, str]) -> None:
    folder = storage.open(key, *expected)
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


def _read_elsewhere(key: str) -> bool:
    """Whether nobody reads a folder on the machine that has written it, unless the run comes back there."""
    return key.startswith(f"{SNAPSHOTS}/") or key.endswith(PLAIN)


def _remove_whole(folder: Path) -> bool:
    """Remove a folder so that nobody takes what is left meanwhile for the whole; whether it was there."""
    gone = folder if folder.name.startswith(".") else _sibling(folder)
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _bytes_for_copies(root: Path) -> int:
    return shutil.disk_usage(root).total // _SHARE


def _bytes_of(folder: Path) -> int:
    """Of its files; what is being removed meanwhile has none."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _written_at(folder: Path) -> float:
    """When a folder, or a file in it, was changed last; what is being removed meanwhile was just now."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return time.time()


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
