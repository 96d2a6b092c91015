"""Saved weights on their way from storage into an engine: each file is what was written, or it is not used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engines.adapters import OPTIMIZER
from engines.interface import DamagedWeights, UserError, WeightsOutOfReach
from engines.storage import CHECKSUMS, FolderStorage, sha256_of

log = logging.getLogger(__name__)


def open_weights(storage: FolderStorage, key: str, *names: str) -> Path:
    """The folder of a key, whose files of the given names are compared with the checksums beside them.

    A folder without checksums is older than they are; its files are taken as they are. A copy that is not what was
    written is brought anew, once. Raises DamagedWeights for what is missing, cannot be read or differs,
    WeightsOutOfReach when the storage does not answer, and UserError when weights were saved without the optimizer's
    state.
    """
    try:
        return _open(storage, key, names)
    except UserError as error:
        damaged = isinstance(error, DamagedWeights) or not (storage.path(key) / CHECKSUMS).is_file()
        if not damaged or not storage.drop_copy(key):
            raise
        log.warning("the copy of %s is brought anew: %s", key, error)
    return _open(storage, key, names)


def _open(storage: FolderStorage, key: str, names: Sequence[str]) -> Path:
    try:
        folder = storage.bring(key)
    except OSError as error:
        log.error("%s cannot be read: %s", key, error)
        raise WeightsOutOfReach(
            "the storage of weights is out of reach; nothing says that these are damaged. Send it again later",
            storage.path(key),
        ) from error
    if not folder.is_dir():
        raise DamagedWeights("the stored weights are not there any more", folder)
    written = _written(folder)
    for name in names:
        path = folder / name
        if name == OPTIMIZER and not (path.is_file() if written is None else name in written):
            raise UserError("the checkpoint holds no optimizer state; load its weights alone")
        _compare(path, written)
    return folder


def unreadable(path: Path, why: Exception) -> DamagedWeights:
    """A file does not hold what its name says, though nothing else tells that it was changed."""
    return _damaged(path, f"cannot be read ({why})")


def _written(folder: Path) -> dict[str, str] | None:
    """The checksums of a folder; None: it has none."""
    path = folder / CHECKSUMS
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def _compare(path: Path, written: dict[str, str] | None) -> None:
    try:
        path.stat()
        differs = written is not None and sha256_of(path) != written.get(path.name)
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    if differs:
        raise _damaged(path, "is not what was written")


def _damaged(path: Path, what: str) -> DamagedWeights:
    return DamagedWeights(f"the stored weights are damaged: {path.name} {what}", path)
