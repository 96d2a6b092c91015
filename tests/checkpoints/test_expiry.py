"""Checkpoints that have expired: hidden at once, deleted with their files soon; and lists in pages."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx

from gateway.app import running_gateway
from gateway.checkpoints import delete_expired
from gateway.engine_settings import EngineSettings
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from tests.admin.conftest import save
from tests.checkpoints.conftest import trained_run
from tests.store.test_references import a_checkpoint, begin_at


async def test_the_expired_are_deleted_with_their_files(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    database = Database(settings.url, sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    try:
        past = time.time() - 1
        gone = [await a_checkpoint(store) for _ in range(3)]
        kept = await a_checkpoint(store, expires_at=time.time() + 3600)
        needed = await a_checkpoint(store)
        await begin_at(store, needed)
        for checkpoint in (*gone, needed):
            await store.checkpoints.set_expiry(checkpoint.path, past)
        for checkpoint in (*gone, kept, needed):
            (settings.storage_dir / checkpoint.folder).mkdir(parents=True)
        assert await delete_expired(store, settings) == 4
        assert await delete_expired(store, settings) == 0
        assert [(settings.storage_dir / each.folder).exists() for each in gone] == [False] * 3
        assert (settings.storage_dir / kept.folder).exists()
        assert (settings.storage_dir / needed.folder).exists()  # a run began at it
        assert [each.path for each in await store.checkpoints.page(limit=9)] == [kept.path]
    finally:
        await store.close()


async def test_a_gateway_looks_for_them_again_and_again(tmp_path: Path) -> None:
    fake = EngineSettings(name="fake", plugin="fake", base_model="fake/model")
    settings = Settings(data_dir=tmp_path, engines=(fake,), duty_s=0.05)
    async with running_gateway(settings) as gateway:
        for _ in range(2):
            checkpoint = await a_checkpoint(gateway.store)
            folder = settings.storage_dir / checkpoint.folder
            folder.mkdir(parents=True)
            await gateway.store.checkpoints.set_expiry(checkpoint.path, time.time() - 1)
            for _ in range(1000):
                if folder.exists():
                    await asyncio.sleep(0.01)
            assert not folder.exists()
        duties = {duty.name: duty for duty in await gateway.store.duties.all()}
    assert duties["expired checkpoints"].failures == 0


def test_lists_come_newest_first_in_pages_that_add_up(alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    saved = [save(alice, run_id, 3 + number, f"n{number}") for number in range(5)]
    first = alice.get("/api/v1/checkpoints?limit=2&offset=0").json()
    assert [row["tinker_path"] for row in first["checkpoints"]] == saved[:-3:-1]
    total = first["cursor"]["total_count"]
    seen: list[str] = []
    for offset in range(0, total, 2):
        page = alice.get(f"/api/v1/checkpoints?limit=2&offset={offset}").json()
        assert page["cursor"] == {"offset": offset, "limit": 2, "total_count": total}
        seen += [row["tinker_path"] for row in page["checkpoints"]]
    assert len(seen) == len(set(seen)) == total
    assert seen[:5] == saved[::-1]
