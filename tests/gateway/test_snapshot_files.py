"""Snapshots elsewhere: a file system of fsspec's in memory; an S3-compatible server (moto's), a gateway on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import fsspec
import pytest

from gateway.errors import ConfigurationError
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.snapshot_duties import remove_strays
from gateway.snapshot_files import SnapshotFiles, SnapshotsUnreachable, check_place
from gateway.store import Store
from gateway.store.database import Database
from tests.gateway.test_recovery import kill_engine
from tests.gateway.test_snapshots import Trainer
from tests.object_store import new_bucket, object_store
from tests.served import ServedGateway

DATABASE = b"0123456789"
KEY = SnapshotFiles.new_key(DATABASE)
FILES = {"adapter.safetensors": b"adapter" * 1000, "optimizer.safetensors": b"moments"}


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with object_store() as address:
        yield address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a prefix in a bucket of this test's own."""
    return new_bucket(s3_server, monkeypatch)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"memory://{time.time_ns()}/prefix"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    yield store
    await store.close()


def written(data: Path, key: str = KEY) -> Path:
    """A folder as an engine leaves it."""
    folder = data / "storage" / key
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_files_move_there_and_are_at_hand_when_they_are_needed(url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, snapshot_url=url)
    check_place(settings)
    files = SnapshotFiles(settings)
    folder = written(tmp_path)
    await files.keep(KEY)
    assert not folder.exists()
    other = SnapshotFiles(Settings(data_dir=tmp_path / "other", snapshot_url=url + "/"))  # another machine
    place = tmp_path / "other" / "storage" / KEY
    await other.bring(KEY)
    assert contents(place) == FILES
    await other.put_away(KEY)
    assert not place.exists()
    await files.remove(KEY)
    await other.bring(KEY)
    assert contents(place) == {}  # the engine says what is missing
    await files.remove(KEY)  # once more is no error


async def test_a_missing_file_is_missing_and_nothing_else(url: str, tmp_path: Path) -> None:
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=url))
    folder = written(tmp_path)
    await files.keep(KEY)
    system, root = fsspec.url_to_fs(url)
    system.rm(f"{root}/{KEY}/optimizer.safetensors")
    await files.bring(KEY)
    assert contents(folder) == {"adapter.safetensors": FILES["adapter.safetensors"]}


async def test_two_may_bring_the_same_at_once(s3: str, tmp_path: Path) -> None:
    """Not in memory: there all who read a file share one place in it."""
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=s3))
    folder = written(tmp_path)
    await files.keep(KEY)
    await asyncio.gather(*(files.bring(KEY) for _ in range(4)))
    assert contents(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]


async def test_what_killed_processes_had_brought_or_not_moved_yet_is_removed_here_and_kept_there(
    url: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=url))
    key = files.new_key(await store.secrets.get("storage"))
    written(tmp_path, key)
    await files.keep(key)
    await files.bring(key)
    half_moved = written(tmp_path, files.new_key(await store.secrets.get("storage")))
    assert await remove_strays(store, files) == 0
    monkeypatch.setattr("gateway.snapshot_duties.STRAY_S", -60)
    monkeypatch.setattr(files, "older_than", nothing_there)
    assert await remove_strays(store, files) == 2
    assert list(half_moved.parent.iterdir()) == []
    await files.bring(key)
    assert contents(tmp_path / "storage" / key) == FILES


async def nothing_there(seconds: float, database: bytes) -> list[str]:
    return []


async def test_strays_are_found_by_their_age(
    url: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=url))
    ours, others = await store.secrets.get("storage"), b"another database's"
    assert await files.older_than(-60, ours) == []
    stray, foreign = files.new_key(ours), files.new_key(others)
    for key in (stray, foreign):
        written(tmp_path, key)
        await files.keep(key)
    assert await files.older_than(60, ours) == []
    assert await files.older_than(-60, ours) == [stray]
    assert await remove_strays(store, files) == 0  # it is not an hour old
    monkeypatch.setattr("gateway.snapshot_duties.STRAY_S", -60)
    assert await remove_strays(store, files) == 1
    assert await files.older_than(-60, ours) == []
    assert await files.older_than(-60, others) == [foreign]


async def test_a_place_out_of_reach_is_told_and_leaves_nothing_behind(
    s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = s3.replace("tandem-", "nobodys-")
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=gone))
    folder = written(tmp_path)
    with pytest.raises(SnapshotsUnreachable) as raised:
        await files.keep(KEY)
    assert not folder.exists()
    sentence, _, error_id = str(raised.value).rpartition(" ")
    assert sentence == "the storage of snapshots cannot be reached; the log has more under"
    assert f"error {error_id}: " in caplog.text and "bucket" in caplog.text


async def test_credentials_of_the_url_are_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(url: str) -> None:
        raise OSError(f"{url}: login of alice with hush!word refused")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    url = "ftp://alice:hush%21word@host/folder"
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url=url))
    with pytest.raises(SnapshotsUnreachable):
        await files.older_than(0, DATABASE)
    assert "ftp://***host/folder: login of alice with *** refused" in caplog.text
    assert "hush" not in caplog.text


def test_a_url_that_nothing_understands_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="snapshot_url begins with 'nonsense'") as raised:
        check_place(Settings(snapshot_url="nonsense://alice:hush@x"))
    assert "hush" not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.slow
def test_a_gateway_recovers_from_snapshots_in_s3(s3: str, tmp_path: Path) -> None:
    gateway = ServedGateway(
        tmp_path / "data", None, snapshot_steps="3", snapshot_s="0", snapshot_url=s3, duty_s="0.2"
    )
    gateway.start()
    trainer = Trainer(gateway)
    try:
        expected = Trainer(gateway)
        losses = expected.steps(12)
        expected.close()
        found = trainer.paced(8)
        system, root = fsspec.url_to_fs(s3)
        names = system.find(root)
        assert names and all(name.startswith(f"{root}/snapshots/") for name in names)
        kill_engine(gateway)
        assert found + trainer.steps(4) == losses
        assert "from the snapshot after operation 12" in gateway.log.read_text()
        place = gateway.data_dir / "storage" / "snapshots"
        for _ in range(200):  # one may be on its way
            if not list(place.glob("*/*")):
                break
            time.sleep(0.05)
        assert list(place.glob("*/*")) == []
    finally:
        trainer.close()
        gateway.stop()
        gateway.close()


async def test_requests_do_not_wait_for_a_storage_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies are decompressed in asyncio's own threads, which are few."""
    speaks = threading.Event()
    monkeypatch.setattr(SnapshotFiles, "_download", lambda self, elsewhere, key: speaks.wait(30))
    files = SnapshotFiles(Settings(data_dir=tmp_path, snapshot_url="memory://silent"))
    waiting = [asyncio.create_task(files.bring(f"{KEY}{number}")) for number in range(50)]
    try:
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "a body"), 10) == "a body"
        assert not any(task.done() for task in waiting)
    finally:
        speaks.set()
        await asyncio.gather(*waiting)
