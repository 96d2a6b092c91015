"""Storage where a URL says: written here, read on a machine that has nothing in common with this one but the URL."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engines.distant_folders import StorageUnreachable, without_credentials
from engines.interface import DamagedWeights, UserError, WeightsOutOfReach
from engines.performing import refused
from engines.saved_weights import open_weights
from engines.storage import CHECKSUMS, UNUSED_S, FolderStorage, checksums, verify, write_folder

KEY = "checkpoints/0f3a"
FILES = {"adapter.safetensors": b"weights" * 1000, "optimizer.safetensors": b"moments"}


@pytest.fixture
def url() -> str:
    return f"memory://{time.time_ns()}/prefix"


@pytest.fixture
def here(url: str, tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "here", url)


@pytest.fixture
def there(url: str, tmp_path: Path) -> FolderStorage:
    """Of another machine."""
    return FolderStorage(tmp_path / "there", url + "/")


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers at any URL."""

    def refuse(url: str) -> None:
        raise TimeoutError(f"{url}: alice's hush!word was not heard")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKSUMS}


def test_what_is_written_on_one_machine_is_read_on_another(here: FolderStorage, there: FolderStorage) -> None:
    size = write_folder(here, KEY, FILES)
    folder = there.open(KEY, *FILES)
    assert folder == there.root / KEY and contents(folder) == FILES
    assert there.size(folder) == size == sum(map(len, FILES.values()))
    verify(there, KEY, checksums(here.root / KEY))
    assert open_weights(there, KEY, *FILES) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["0f3a"], "nothing half written is left"


def test_a_copy_is_not_brought_again(
    here: FolderStorage, there: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(here, KEY, FILES)
    there.open(KEY)
    silence(monkeypatch)
    assert contents(there.open(KEY)) == contents(here.open(KEY)) == FILES


def test_it_is_stored_before_it_is_there(here: FolderStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that does not reach the storage has failed, and leaves nothing that could be taken for it."""
    silence(monkeypatch)
    with pytest.raises(StorageUnreachable):
        write_folder(here, KEY, FILES)
    assert list((here.root / "checkpoints").iterdir()) == []


def test_what_was_damaged_on_the_way_is_not_used(here: FolderStorage, there: FolderStorage, url: str) -> None:
    write_folder(here, KEY, FILES)
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/{KEY}/adapter.safetensors", b"weightz" * 1000)
    with pytest.raises(DamagedWeights, match=r"adapter\.safetensors is not what was written"):
        open_weights(there, KEY, "adapter.safetensors")
    with pytest.raises(UserError, match=r"adapter\.safetensors .* is not what was written"):
        verify(there, KEY, checksums(here.root / KEY))


def test_what_is_removed_is_nowhere(here: FolderStorage, there: FolderStorage) -> None:
    write_folder(here, KEY, FILES)
    here.remove(KEY)
    here.remove(KEY)  # once more is no error
    for storage in (here, there):
        with pytest.raises(UserError, match="there is nothing stored"):
            storage.open(KEY)
        with pytest.raises(DamagedWeights, match="not there any more"):
            open_weights(storage, KEY)


def test_a_silent_storage_is_told_apart_from_an_empty_one(
    there: FolderStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    silence(monkeypatch)
    with pytest.raises(StorageUnreachable):
        there.open(KEY)
    with pytest.raises(WeightsOutOfReach, match="the storage of weights is out of reach") as raised:
        open_weights(there, KEY)
    assert not isinstance(raised.value, DamagedWeights) and raised.value.path == there.path(KEY)
    failure = refused(raised.value, "loading")
    assert failure.category == "server" and failure.message.startswith(str(raised.value))
    assert "checkpoints/0f3a cannot be read: TimeoutError" in caplog.text


def test_credentials_of_the_url_are_in_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silence(monkeypatch)
    url = "ftp://alice:hush%21word@host/folder?sig=shh%2Fshh&v=2"
    storage = FolderStorage(tmp_path, url)
    with pytest.raises(StorageUnreachable) as raised:
        storage.open(KEY)
    assert str(raised.value) == "TimeoutError: ftp://***host/folder?***: alice's *** was not heard"
    assert raised.value.__suppress_context__
    monkeypatch.setattr(fsspec, "url_to_fs", tell_signature)
    with pytest.raises(StorageUnreachable) as raised:
        storage.open(KEY)
    assert str(raised.value) == "ValueError: signature ***, once *** is no good"
    assert without_credentials(url) == "ftp://host/folder"
    assert without_credentials("s3://bucket/a@b?sig=x@y") == "s3://bucket/a@b"
    assert without_credentials("") == ""


def test_copies_that_nobody_uses_go_and_come_again(here: FolderStorage) -> None:
    for key in ("checkpoints/used", "checkpoints/unused", "snapshots/ab/unused"):
        write_folder(here, key, FILES)
        here.open(key)
    half = here.root / "checkpoints" / f".x.{'0' * 32}.partial"
    half.mkdir()
    (half / "file").write_bytes(b"x")
    long_ago = time.time() - UNUSED_S - 60
    for path in here.root.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    here.open("checkpoints/used")
    write_folder(here, "checkpoints/new", FILES)
    left = sorted(str(path.parent.relative_to(here.root)) for path in here.root.rglob(CHECKSUMS))
    assert left == ["checkpoints/new", "checkpoints/used"]
    assert not half.exists()
    assert contents(here.open("snapshots/ab/unused")) == FILES


def test_on_a_disk_alone_nothing_goes(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    write_folder(storage, KEY, FILES)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    write_folder(storage, "checkpoints/new", FILES)
    assert contents(storage.open(KEY)) == FILES


@pytest.mark.parametrize("kind", ["disk", "url"])
def test_what_is_old_and_whose_it_is(kind: str, url: str, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path, url if kind == "url" else "")
    assert storage.older_than("checkpoints", time.time() + 60) == []
    write_folder(storage, KEY, FILES)
    write_folder(storage, "other/one", FILES)
    assert storage.older_than("checkpoints", time.time() + 60) == [KEY]
    assert storage.older_than("checkpoints", time.time() - 60) == []
    assert storage.owner() == ""
    storage.claim("ours")
    assert (
        FolderStorage(tmp_path if kind == "disk" else tmp_path / "b", storage_url(kind, url)).owner()
        == "ours"
    )


def storage_url(kind: str, url: str) -> str:
    return url if kind == "url" else ""


def test_a_storage_is_tried_before_it_is_needed(
    here: FolderStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.check()
    FolderStorage(tmp_path).check()
    with pytest.raises(ValueError, match="nonsense"):
        FolderStorage(tmp_path, "nonsense://x").check()
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", refuse)
    with pytest.raises(StorageUnreachable, match="PermissionError: for reading only"):
        here.check()


def refuse(*arguments: Any, **more: Any) -> None:
    raise PermissionError("for reading only")


def tell_signature(url: str) -> None:
    raise ValueError("signature shh/shh, once shh%2Fshh is no good")
