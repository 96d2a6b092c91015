"""Folders are there whole or not at all; no key leads elsewhere; what was killed leaves nothing in the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.interface import UserError
from engines.storage import CHECKSUMS, FolderStorage, write_folder

KEY = "checkpoints/0f3a"
FILES = {"one.bin": b"first", "two.bin": b"\x00" * 1000}


def entries(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_what_was_written_is_there(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    assert write_folder(FolderStorage(root), KEY, FILES) == 1005
    folder = FolderStorage(root).open(KEY, *FILES)
    assert folder == root / KEY
    stored = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert json.loads(stored.pop(CHECKSUMS)) == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }
    assert stored == FILES
    assert FolderStorage.size(folder) == 1005
    assert entries(root) == ["checkpoints", KEY, *(f"{KEY}/{name}" for name in (CHECKSUMS, *FILES))]


def test_nothing_is_seen_before_it_is_complete(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with storage.write(KEY) as folder:
        (folder / "one.bin").write_bytes(b"first")
        assert not storage.path(KEY).exists()
        with pytest.raises(UserError):
            storage.open(KEY)
    assert (storage.open(KEY) / "one.bin").read_bytes() == b"first"


def test_size_counts_files_in_folders_below(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    with storage.write(KEY) as folder:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_bytes(b"12345")
        (folder / "file").write_bytes(b"678")
    assert storage.size(storage.open(KEY)) == 8


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_what_was_there_before(tmp_path: Path, existing: bool) -> None:
    storage = FolderStorage(tmp_path)
    if existing:
        write_folder(FolderStorage(tmp_path), KEY, FILES)
    before = entries(tmp_path)
    with pytest.raises(KeyboardInterrupt), storage.write(KEY) as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert [entry for entry in entries(tmp_path) if entry != "checkpoints"] == before[1:]


def test_an_error_while_syncing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on the device")

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_folder(FolderStorage(tmp_path), KEY, FILES)
    assert entries(tmp_path) == ["checkpoints"]


def test_a_repeated_save_replaces_the_first(tmp_path: Path) -> None:
    write_folder(FolderStorage(tmp_path), KEY, FILES)
    write_folder(FolderStorage(tmp_path), KEY, {"one.bin": b"second"})
    assert entries(tmp_path) == ["checkpoints", KEY, f"{KEY}/{CHECKSUMS}", f"{KEY}/one.bin"]
    assert (FolderStorage(tmp_path).open(KEY) / "one.bin").read_bytes() == b"second"


def test_the_other_folders_stay(tmp_path: Path) -> None:
    """Also one whose name begins with the key's, and one that is being written beside it."""
    storage = FolderStorage(tmp_path)
    write_folder(FolderStorage(tmp_path), KEY + "b", FILES)
    with storage.write(KEY + ".x") as other:
        (other / "file").write_bytes(b"other")
        write_folder(FolderStorage(tmp_path), KEY, {"one.bin": b""})
        write_folder(FolderStorage(tmp_path), KEY, {"one.bin": b"again"})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0f3a", "0f3a.x", "0f3ab"]
    assert (FolderStorage(tmp_path).open(KEY + ".x") / "file").read_bytes() == b"other"


def test_files_are_synced_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power loss could leave a folder under its name with empty files in it."""
    done: list[str] = []
    opened: dict[int, str] = {}
    open_file, fsync, rename = os.open, os.fsync, Path.rename

    def note_open(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = open_file(path, flags, mode, dir_fd=dir_fd)
        opened[descriptor] = Path(path).name
        return descriptor

    def note_fsync(descriptor: int) -> None:
        done.append(f"sync {opened[descriptor]}")
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(path, target)

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    write_folder(FolderStorage(tmp_path), KEY, FILES)
    assert sorted(done[:3]) == [f"sync {CHECKSUMS}", "sync one.bin", "sync two.bin"]
    assert done[3].endswith(".partial")
    assert done[4:] == ["rename to 0f3a", "sync checkpoints"]


KILLED = """
import os, signal, sys
from engines.storage import FolderStorage
with FolderStorage(sys.argv[1]).write(sys.argv[2]) as folder:
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), KEY]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=KEY):
        FolderStorage(tmp_path).open(KEY)
    assert len(entries(tmp_path)) == 3
    write_folder(FolderStorage(tmp_path), KEY, {"one.bin": b"whole"})
    assert entries(tmp_path) == ["checkpoints", KEY, f"{KEY}/{CHECKSUMS}", f"{KEY}/one.bin"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoints/none.*deleted"):
        FolderStorage(tmp_path).open("checkpoints/none")
    write_folder(FolderStorage(tmp_path), KEY, FILES)
    with pytest.raises(UserError, match=r"checkpoints/0f3a holds no three\.bin"):
        FolderStorage(tmp_path).open(KEY, "one.bin", "three.bin")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc",
        "..",
        "checkpoints/..",
        "checkpoints/../x",
        "./x",
        "checkpoints/.hidden",
        "checkpoints//x",
        "checkpoints/",
        "a\\b",
        "a b",
        "a\n",
        "a\x00",
        "é",
    ],
)
def test_a_key_never_leads_elsewhere(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="storage key"):
        write_folder(FolderStorage(tmp_path), key, FILES)
    with pytest.raises(ValueError, match="storage key"):
        FolderStorage(tmp_path).open(key)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("key", ["x", "a/b/c", "checkpoints/Run-1_b.v2"])
def test_ordinary_keys_are_paths_below_the_root(tmp_path: Path, key: str) -> None:
    assert FolderStorage(tmp_path).path(key) == tmp_path / key
