"""Encryption beside the lane: whatever goes wrong is an outcome, and one folder is one thread's at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pyrage
import pytest

from engines.operations import SaveWeightsResult, decode_result
from engines.storage import FolderStorage, write_folder
from gateway.dispatch.sealing import Sealing
from gateway.sealing import plain_folder, seal_folder
from gateway.settings import Settings
from gateway.store.records import Checkpoint, CheckpointKind, Outcome
from tests.store.conftest import a_run, a_session, an_operation

IDENTITY = pyrage.x25519.Identity.generate()
RECIPIENTS = [str(IDENTITY.to_public())]
FOLDER = "checkpoints/f"


def a_save(settings: Settings) -> Outcome:
    """What an engine has saved in the plain, for a recipient."""
    write_folder(settings.storage, plain_folder(FOLDER), {"a.bin": b"weights"})
    run = a_run(a_session())
    context = {"checkpoint": {"recipients": RECIPIENTS}}
    future = an_operation(run, 1, "save_weights", context=context, folder=FOLDER)
    checkpoint = Checkpoint(
        "p",
        "alice",
        run.run_id,
        CheckpointKind.EXTERNAL,
        "n",
        FOLDER,
        "m",
        {},
        False,
        1,
        False,
        {},
        0.0,
        None,
    )
    return Outcome(future, result=b"", checkpoint=checkpoint)


async def settled(sealing: Sealing, outcome: Outcome) -> Outcome:
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    sealing.start(outcome, done.set_result)
    return await asyncio.wait_for(done, 10)


async def test_an_error_that_nobody_foresaw_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> int:
        raise pyrage.EncryptError("secret details")

    monkeypatch.setattr("gateway.dispatch.sealing.seal_folder", broken)
    settings = Settings(data_dir=tmp_path)
    with caplog.at_level(logging.ERROR, "gateway"):
        outcome = await settled(Sealing(settings), a_save(settings))
    assert outcome.failed
    assert outcome.error is not None
    assert outcome.error_category == "server"
    assert outcome.error_id is not None
    assert outcome.error_id in outcome.error
    assert "secret" not in outcome.error
    assert f"({outcome.error_id})" in caplog.text
    assert "secret details" in caplog.text


async def test_after_a_reset_the_folder_is_sealed_when_the_first_thread_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    inside: list[str] = []

    def slow(storage: FolderStorage, folder: str, recipients: list[str]) -> int:
        assert not inside, "two threads seal one folder"
        inside.append(folder)
        begun.set()
        go_on.wait(10)
        size = seal_folder(storage, folder, recipients)
        inside.clear()
        return size

    monkeypatch.setattr("gateway.dispatch.sealing.seal_folder", slow)
    settings = Settings(data_dir=tmp_path)
    sealing, outcome = Sealing(settings), a_save(settings)
    sealing.start(outcome, lambda _: pytest.fail("it was forgotten"))
    await asyncio.to_thread(begun.wait, 10)
    sealing.cancel()
    again = asyncio.create_task(settled(sealing, outcome))
    await asyncio.sleep(0.1)
    assert not again.done()
    go_on.set()
    final = await again
    assert not final.failed, final.error
    [sealed] = (settings.storage_dir / FOLDER).iterdir()
    assert pyrage.decrypt(sealed.read_bytes(), [IDENTITY]) == b"weights"
    assert final.result is not None
    result = decode_result(final.result)
    assert isinstance(result, SaveWeightsResult)
    assert result.size_bytes == sealed.stat().st_size


async def test_requests_do_not_wait_for_what_is_being_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies are decompressed in asyncio's own threads, which are few."""
    ends = threading.Event()
    monkeypatch.setattr("gateway.dispatch.sealing.seal_folder", lambda *_: ends.wait(30) and 1)
    settings = Settings(data_dir=tmp_path)
    sealing, outcome = Sealing(settings), a_save(settings)
    assert outcome.checkpoint is not None
    finished: list[Outcome] = []
    for number in range(50):
        checkpoint = replace(outcome.checkpoint, folder=f"{FOLDER}{number}")
        sealing.start(replace(outcome, checkpoint=checkpoint), finished.append)
    try:
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "a body"), 10) == "a body"
        assert not finished
    finally:
        ends.set()
        await sealing.finish()
    assert len(finished) == 50
