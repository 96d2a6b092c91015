"""A checkpoint's adapter as files on this machine: the archive that a gateway sends, unpacked."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CONFIG = "adapter_config.json"
_COMPLETE = "checkpoint_complete"
"""An entry of archives that tells older clients that nothing is missing."""
_BASE_MODEL = "base_model_name_or_path"


class ExportFailed(Exception):
    """The files cannot be written; the message says why."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: sizes in bytes by the files' names, and the base model that the adapter now names."""

    folder: str
    files: dict[str, int]
    base_model: str


def require_new(folder: Path) -> None:
    """Raises ExportFailed unless there is nothing at `folder`, or an empty folder."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ExportFailed(f"{folder} is not empty; name a new folder")
    except NotADirectoryError as error:
        raise ExportFailed(f"{folder} is a file; name a new folder") from error


def unpack(archive: IO[bytes], folder: Path, base_model: str | None) -> Exported:
    """Write the files of a tar into `folder`, naming `base_model` in the adapter's configuration if it is given.

    Raises ExportFailed, also for an archive with anything but plain files side by side.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).name != member.name:
                    raise ExportFailed(f"the archive holds {member.name!r}, which is no plain file")
                if member.name != _COMPLETE:
                    _write(tar, member, folder / member.name)
        named = _name_base_model(folder / CONFIG, base_model)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    except (OSError, tarfile.TarError) as error:
        raise ExportFailed(f"{folder} cannot be written: {error}") from error
    return Exported(str(folder), sizes, named)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = tar.extractfile(member)
    assert content is not None  # it is a plain file
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file)


def _name_base_model(config: Path, base_model: str | None) -> str:
    """What the configuration names, after the change."""
    try:
        values = json.loads(config.read_text())
        if base_model is not None:
            values[_BASE_MODEL] = base_model
            config.write_text(json.dumps(values, indent=2) + "\n")
        return str(values[_BASE_MODEL])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ExportFailed(f"the archive has no {CONFIG} of an adapter; is it encrypted?") from error
