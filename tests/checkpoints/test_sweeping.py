"""Folders that nothing names are freed after a day; what anything names, or may name yet, stays."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engines.storage import write_folder
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Submission
from gateway.store.records import Outcome
from gateway.sweeping import GRACE_S, ForeignStorage, sweep
from tests.store.conftest import a_run, a_session, an_operation
from tests.store.test_references import a_checkpoint, begin_at, load, sample_from


class Place:
    """A store with its folder of files."""

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        self.settings = Settings(data_dir=folder)
        self.settings.storage_dir.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{database or folder / 'tandem.db'}"
        self.database = Database(url, sqlite_synchronous="NORMAL")
        self.store = Store(self.database)
        self.folder = self.settings.storage_dir / "checkpoints"

    def make(self, name: str, age_s: float = GRACE_S + 60) -> None:
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age_s,) * 2)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    async def sweep(self) -> int:
        return await sweep(self.store, self.settings)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path / "data")
    await upgrade(place.database)
    place.store.start()
    yield place
    await place.store.close()


async def test_what_is_named_stays_and_the_rest_goes(place: Place) -> None:
    store = place.store
    named = [await a_checkpoint(store) for _ in range(4)]
    await begin_at(store, named[1])
    await load(store, named[2])
    await sample_from(store, named[3])
    for checkpoint in named[1:]:
        assert await store.checkpoints.delete(checkpoint.path) is None  # a log or a sampler keeps its files
    kept = {checkpoint.folder.removeprefix("checkpoints/") for checkpoint in named}
    for name in kept:
        place.make(name)
    place.make("young", age_s=GRACE_S - 60)
    place.make(".young.0123456789abcdef0123456789abcdef.partial", age_s=60)
    for name in ("stray", ".stray.0123456789abcdef0123456789abcdef.partial"):
        place.make(name)
    assert await place.sweep() == 2
    assert place.names() == {*kept, "young", ".young.0123456789abcdef0123456789abcdef.partial"}
    assert await place.sweep() == 0


async def test_what_an_open_save_writes_stays_until_it_is_over(place: Place) -> None:
    """Also the plain files of an export that is to be encrypted; those of a finished one go."""
    store = place.store
    finished = await a_checkpoint(store)
    run = a_run(await store.sessions.create(a_session()))
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"x", run))
    await store.futures.settle(Outcome(create, result=b""))
    save = an_operation(run, 1, "save_weights", folder="checkpoints/open")
    await store.futures.submit(Submission(save, b"x"))
    done = finished.folder.removeprefix("checkpoints/")
    for name in ("open", "open.plain", done, f"{done}.plain"):
        place.make(name)
    assert await place.sweep() == 1
    assert place.names() == {"open", "open.plain", done}
    await store.futures.settle(Outcome(replace(save, epoch=1), error="no room", error_category="server"))
    assert await place.sweep() == 2
    assert place.names() == {done}


async def test_the_files_of_another_database_are_left_alone(place: Place, tmp_path: Path) -> None:
    """An operator who goes from SQLite to Postgres and keeps `data_dir` must be able to go back."""
    checkpoint = await a_checkpoint(place.store)
    name = checkpoint.folder.removeprefix("checkpoints/")
    other = Place(tmp_path / "data", tmp_path / "other.db")
    await upgrade(other.database)
    other.store.start()
    try:
        place.make(name)
        with pytest.raises(ForeignStorage, match="another database"):
            await other.sweep()  # nobody has put a mark there yet, and it knows none of what lies there
        assert await place.sweep() == 0
        place.make("stray")
        with pytest.raises(ForeignStorage):
            await other.sweep()
        assert place.names() == {name, "stray"}
        assert await place.sweep() == 1
    finally:
        await other.store.close()


async def test_no_credentials_of_the_url_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.sweeping.GRACE_S", -60)
    url = f"memory://alice:hush@{time.time_ns()}/prefix?sig=a@hush"
    settings = Settings(data_dir=place.settings.data_dir, storage_url=url)
    write_folder(settings.storage, "checkpoints/stray", {"file": b"x"})
    with pytest.raises(ForeignStorage, match="another database") as raised:
        await sweep(place.store, settings)
    assert "hush" not in str(raised.value) and str(raised.value).startswith("memory://")


async def test_an_empty_folder_is_the_first_ones(place: Place) -> None:
    assert await place.sweep() == 0
    place.make("stray")
    assert await place.sweep() == 1
