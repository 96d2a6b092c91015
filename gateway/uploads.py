"""Receiving an adapter as a tar: two files with known names, each bounded, whatever else the tar says.

Nothing is extracted under a name that a client has chosen, and the headers are read one block at a time, so that no
header makes the server hold more than that.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from engines.interface import UserError

_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_LARGEST_EXTENDED = 64 << 10
_MOST_ENTRIES = 100
_MARKER = "checkpoint_complete"
"""The empty last file of a downloaded archive."""
_CHUNK = 1 << 20
_ECHO = 100


def unpack_files(archive: BinaryIO, target: Path, limits: Mapping[str, int]) -> None:
    """Copy the files that `limits` names, with their most bytes, from an uncompressed tar into a folder.

    A leading folder, entries for folders and an archive's end mark are passed over. Raises UserError for any other
    entry, a file too large, one that comes twice, one that is missing, and a tar that is broken.
    """
    found: set[str] = set()
    for _ in range(_MOST_ENTRIES):
        entry = _next_entry(archive)
        if entry is None:
            break
        if entry.type in _EXTENDED:
            _skip(archive, entry, _LARGEST_EXTENDED)
        elif entry.isdir() or entry.name == _MARKER:
            _skip(archive, entry, 0)
        else:
            found.add(_copy(archive, entry, target, limits, found))
    missing = sorted(limits.keys() - found)
    if missing:
        raise UserError(f"the tar holds no {missing[0]}; it needs {' and '.join(limits)}")


def _next_entry(archive: BinaryIO) -> tarfile.TarInfo | None:
    """The header at hand; None at the end."""
    block = archive.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(f"the body is no uncompressed tar: {error}") from error


def _copy(
    archive: BinaryIO, entry: tarfile.TarInfo, target: Path, limits: Mapping[str, int], found: set[str]
) -> str:
    name = entry.name.rpartition("/")[2]
    shown = ascii(entry.name[:_ECHO])
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name not in limits:
        raise UserError(
            f"the tar holds {shown}; it must hold {' and '.join(limits)} as plain files and nothing else"
        )
    if name in found:
        raise UserError(f"the tar holds {name} twice")
    if not 0 <= entry.size <= limits[name]:
        raise UserError(f"{name} has {entry.size} bytes; at most {limits[name]} are taken")
    left = entry.size
    with (target / name).open("wb") as file:
        while left:
            chunk = archive.read(min(left, _CHUNK))
            if not chunk:
                raise UserError(f"the tar ends in the middle of {name}")
            file.write(chunk)
            left -= len(chunk)
    archive.read(-entry.size % tarfile.BLOCKSIZE)
    return name


def _skip(archive: BinaryIO, entry: tarfile.TarInfo, largest: int) -> None:
    """Pass over what an entry brings with it."""
    if not 0 <= entry.size <= largest:
        raise UserError(f"the tar's entry {entry.name[:_ECHO]!a} has {entry.size} bytes")
    archive.read(entry.size + -entry.size % tarfile.BLOCKSIZE)
