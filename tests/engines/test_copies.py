"""What a machine keeps of what is stored elsewhere: whole or not at all, as long as it is used, and not too much."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import pytest

from engines import storage as storage_module
from engines.distant_folders import DistantFolders
from engines.fake import FakeEngine
from engines.host import require_storage
from engines.interface import DamagedWeights, EngineConfig, UserError
from engines.messages import Perform, Restore, RunAddress, TakeSnapshot
from engines.operations import encode
from engines.performing import TrainingCalls
from engines.saved_weights import open_weights
from engines.snapshot_writing import SnapshotWriter
from engines.storage import CHECKSUMS, UNUSED_S, FolderStorage, checksums, verify, write_folder
from gateway.duties import standing_duties
from gateway.fleet import Fleet
from gateway.retention import Retention
from gateway.settings import Settings
from gateway.store import Store
from tests.engines.material import CREATE
from tests.engines.owner import Owner

KEY = "checkpoints/0f3a"
FILES = {"adapter.safetensors": b"weights" * 1000, "optimizer.safetensors": b"moments"}
LONG_AGO_S = UNUSED_S + 60


@pytest.fixture
def url() -> str:
    return f"memory://{time.time_ns()}/prefix"


@pytest.fixture
def here(url: str, tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "here", url)


@pytest.fixture
def there(url: str, tmp_path: Path) -> FolderStorage:
    """Of another machine."""
    return FolderStorage(tmp_path / "there", url)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def age(folder: Path, seconds: float) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("key", ["snapshots/ab/0f3a", "checkpoints/0f3a.plain"])
def test_what_nobody_reads_here_leaves_no_copy(here: FolderStorage, there: FolderStorage, key: str) -> None:
    write_folder(here, key, FILES)
    assert files_in(here.root) == []
    assert {path.name for path in there.open(key).iterdir()} == {*FILES, CHECKSUMS}
    stale = here.open(key)
    assert stale.is_dir()
    write_folder(here, key, {"second.bin": b"of a save that comes again"})
    assert files_in(here.root) == [] and (here.open(key) / "second.bin").exists()


def test_a_disk_alone_keeps_them(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    write_folder(storage, "snapshots/ab/0f3a", FILES)
    assert len(files_in(tmp_path)) == len(FILES) + 1
    assert not storage.drop_copy("snapshots/ab/0f3a") and storage.drop_unused() == 0
    assert len(files_in(tmp_path)) == len(FILES) + 1


def test_snapshots_of_an_engine_elsewhere_take_no_room_there(here: FolderStorage, url: str) -> None:
    """Neither one that was written nor one that a run came back from."""
    config = EngineConfig("e", "fake", "m", "", ("train",), str(here.root), 1, storage_url=url)
    engine = FakeEngine.load(config)
    calls, writer = TrainingCalls(engine, engine.info(), config), SnapshotWriter(here)
    created = calls.perform(Perform(0, 1, "create_run", [RunAddress("run", 0)]), [encode(CREATE)])[0]
    assert created.outcomes[0].failure is None
    pending = engine.snapshot("run")
    writer.begin(TakeSnapshot(1, 1, "run", 0, "snapshots/ab/0f3a"), pending)
    writer.close()
    [taken] = writer.finished()
    assert taken.failure is None and taken.checksums and files_in(here.root) == []
    restored = calls.restore(Restore(2, 1, "run", 0, "snapshots/ab/0f3a", taken.checksums), encode(CREATE))
    assert restored.outcomes[0].failure is None and files_in(here.root) == []


def drop_a_file(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def change_a_file(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(b"weightz" * 1000)


def drop_half(folder: Path) -> None:
    """As a removal that was killed."""
    (folder / CHECKSUMS).unlink()
    (folder / "optimizer.safetensors").unlink()


@pytest.mark.parametrize("harm", [drop_a_file, change_a_file, drop_half])
def test_a_broken_copy_is_brought_anew(here: FolderStorage, harm: Callable[[Path], None]) -> None:
    write_folder(here, KEY, FILES)
    expected = checksums(here.path(KEY))
    harm(here.path(KEY))
    assert (open_weights(here, KEY, *FILES) / "adapter.safetensors").read_bytes() == FILES[
        "adapter.safetensors"
    ]
    harm(here.path(KEY))
    verify(here, KEY, expected)


def test_what_is_broken_where_it_is_stored_is_brought_once_more_at_most(
    here: FolderStorage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(here, KEY, FILES)
    expected = checksums(here.path(KEY))
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/{KEY}/adapter.safetensors", b"weightz" * 1000)
    drop_a_file(here.path(KEY))
    pulls = []
    pull = DistantFolders.pull

    def counted(self: DistantFolders, key: str, folder: Path) -> bool:
        pulls.append(key)
        return pull(self, key, folder)

    monkeypatch.setattr(DistantFolders, "pull", counted)
    with pytest.raises(DamagedWeights, match="is not what was written"):
        open_weights(here, KEY, "adapter.safetensors")
    with pytest.raises(UserError, match="is not what was written"):
        verify(here, KEY, expected)
    assert len(pulls) == 2


def test_a_removal_that_is_killed_leaves_nothing_that_looks_whole(
    here: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(here, KEY, FILES)
    age(here.root, LONG_AGO_S)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path, **_: (Path(path) / CHECKSUMS).unlink())
        assert here.drop_unused() == 1
    assert not here.path(KEY).exists()
    [left] = here.path(KEY).parent.iterdir()
    age(left, LONG_AGO_S)
    assert here.drop_unused() == 1 and files_in(here.root) == []
    assert set(FILES) < {path.name for path in here.open(KEY).iterdir()}


def test_an_engine_looks_for_unused_copies(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mounted"
    storage = FolderStorage(tmp_path / "copies", url)
    write_folder(storage, KEY, FILES)
    age(storage.root, LONG_AGO_S)
    with Owner(storage.root, storage_url=url) as owner:
        owner.load()
        until(lambda: not storage.path(KEY).exists())
    assert storage.open(KEY).is_dir(), "it is still stored"


async def test_a_gateway_does_too(tmp_path: Path, url: str) -> None:
    settings = Settings(data_dir=tmp_path, storage_url=url)
    store, fleet = cast(Store, SimpleNamespace(retention=None)), cast(Fleet, None)
    duties = standing_duties(store, settings, Retention(store, settings, fleet, lambda sampler_id: None))
    [duty] = [each for each in duties if each.name == "unused copies"]
    assert not duty.shared, "each has copies of its own"
    write_folder(settings.storage, KEY, FILES)
    assert await duty.run() == 0
    age(settings.storage_dir, LONG_AGO_S)
    assert await duty.run() == 1 and files_in(settings.storage_dir) == []


def test_copies_go_when_nothing_is_written_or_brought_any_more(here: FolderStorage) -> None:
    for key in ("checkpoints/old", "checkpoints/new"):
        write_folder(here, key, FILES)
    age(here.path("checkpoints/old"), LONG_AGO_S)
    end = here.watch_copies(0.01)
    try:
        until(lambda: not here.path("checkpoints/old").exists())
        assert here.path("checkpoints/new").is_dir()
        age(here.path("checkpoints/new"), LONG_AGO_S)
        until(lambda: not here.path("checkpoints/new").exists())
    finally:
        end.set()


def test_the_ones_used_longest_ago_go_when_there_is_no_room(
    here: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"checkpoints/{name}" for name in ("oldest", "older", "recent", "used")]
    for key in keys:
        write_folder(here, key, FILES)
    half = here.root / "checkpoints" / f".x.{'0' * 32}.partial"
    half.mkdir()
    (half / "file").write_bytes(b"x")
    for key, seconds in zip(keys, (3000, 2000, 1000, 10), strict=True):
        age(here.path(key), seconds)
    age(half, 3500)
    size = sum(path.stat().st_size for path in here.path(KEY).with_name("used").iterdir())
    monkeypatch.setattr(storage_module, "_bytes_for_copies", lambda root: 2 * size)
    assert here.drop_unused() == 2
    assert {path.name for path in here.path(KEY).parent.iterdir()} == {"recent", "used", half.name}
    monkeypatch.setattr(storage_module, "_bytes_for_copies", lambda root: 0)
    assert here.drop_unused() == 1 and here.path("checkpoints/used").is_dir(), "somebody is reading it"


def test_folders_of_a_file_system_are_made(tmp_path: Path) -> None:
    """Where folders are real ones, as at file:// and sftp://."""
    storage = FolderStorage(tmp_path / "copies", f"file://{tmp_path}/mounted/prefix")
    assert storage.owner() == "" and storage.older_than("checkpoints", time.time() + 60) == []
    storage.check()
    storage.claim("ours")
    other = FolderStorage(tmp_path / "other", f"file://{tmp_path}/mounted/prefix")
    for key in (KEY, "snapshots/ab/0f3a"):
        write_folder(storage, key, FILES)
        assert open_weights(other, key, *FILES).is_dir()
    assert other.owner() == "ours" and other.older_than("checkpoints", time.time() + 60) == [KEY]
    other.remove(KEY)
    assert not (tmp_path / "mounted" / "prefix" / KEY).exists()


def test_a_place_where_no_folder_can_be_made_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    url = f"file://{tmp_path}/file/prefix"
    config = EngineConfig("e", "fake", "m", "", ("train",), str(tmp_path / "copies"), 1, storage_url=url)
    with pytest.raises(OSError, match="file"):
        require_storage(config)


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
