"""A tar from outside: two bounded files under known names, whatever else it says."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from engines.interface import UserError
from gateway.uploads import unpack_files

LIMITS = {"a.json": 1000, "b.bin": 100_000}


def entry(name: str, body: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """One entry; `size` is what its header claims."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    info.size = len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


A, B = entry("a.json", b"{}"), entry("b.bin", b"x" * 70_000)


def unpacked(tar: bytes, target: Path) -> dict[str, bytes]:
    unpack_files(io.BytesIO(tar), target, LIMITS)
    return {path.name: path.read_bytes() for path in target.iterdir()}


WANTED = {"a.json": b"{}", "b.bin": b"x" * 70_000}


@pytest.mark.parametrize(
    "tar",
    [
        A + B + bytes(1024),
        B + A,
        A + B + entry("checkpoint_complete"),
        A + B + bytes(10240),
        entry("./", kind=tarfile.DIRTYPE) + entry("./a.json", b"{}") + entry("./b.bin", b"x" * 70_000),
        entry("/tmp/../adapter/a.json", b"{}") + B,
    ],
)
def test_the_two_files_come_out_under_their_own_names(tmp_path: Path, tar: bytes) -> None:
    assert unpacked(tar, tmp_path) == WANTED
    assert [path.name for path in tmp_path.parent.iterdir()].count("a.json") == 0


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_pythons_own_tars_are_taken(tmp_path: Path, form: int) -> None:
    """PAX puts an extended header before each file whose time is not whole."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, body in WANTED.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            info.mtime = 1.5
            tar.addfile(info, io.BytesIO(body))
    assert unpacked(buffer.getvalue(), tmp_path) == WANTED


@pytest.mark.parametrize(
    ("tar", "said"),
    [
        (b"", "no a.json"),
        (A, "no b.bin"),
        (A + A + B, "a.json twice"),
        (A + B + entry("README.md", b"hello"), "README.md"),
        (A + entry("b.bin", kind=tarfile.SYMTYPE), "b.bin"),
        (A + entry("b.bin", kind=tarfile.LNKTYPE), "b.bin"),
        (A + entry("b.bin", kind=tarfile.CHRTYPE), "b.bin"),
        (A + entry("b.bin", kind=tarfile.GNUTYPE_SPARSE, size=10), "b.bin"),
        (A + entry("adapter_model.bin", b"pickle"), "adapter_model.bin"),
        (entry("a.json", b"x" * 1001) + B, "at most 1000"),
        (A + entry("b.bin", size=1 << 40), "at most 100000"),
        (A + entry("b.bin", b"x" * 512, size=1024), "ends in the middle of b.bin"),
        (entry("x", kind=tarfile.XHDTYPE, size=1 << 30), "1073741824 bytes"),
        (entry("x", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 30), "it must hold"),
        (entry("d", kind=tarfile.DIRTYPE, size=1 << 30), "1073741824 bytes"),
        (entry("./", kind=tarfile.DIRTYPE) * 200 + A + B, "no a.json"),
        (b"\x1f\x8b" + bytes(600), "no uncompressed tar"),
        (b"PK\x03\x04" * 200, "no uncompressed tar"),
    ],
)
def test_everything_else_is_refused(tmp_path: Path, tar: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        unpacked(tar, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= set(LIMITS)
