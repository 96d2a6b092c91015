"""What is on its way to an engine process when that dies."""

from __future__ import annotations

import asyncio

import pytest

from engines.interface import EngineConfig
from gateway.engine_process import EngineProcess
from gateway.engine_watch import Patience
from gateway.errors import EngineLost
from gateway.launching import Launch


async def sending(engine: EngineProcess) -> asyncio.Task[None]:
    """Something that nobody takes, for no process has been started."""
    task = asyncio.create_task(engine.drop_run("r"))
    await asyncio.sleep(0.05)
    assert not task.done()
    return task


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig("e", "fake", "m", "m", ("sample",), "", 1)


async def test_who_sends_is_told_that_the_engine_is_gone(config: EngineConfig) -> None:
    engine = EngineProcess(config, Launch([], {}), Patience(9, 9))
    task = await sending(engine)
    await engine.kill()
    with pytest.raises(EngineLost, match="it was stopped"):
        await asyncio.wait_for(task, 10)


async def test_who_is_not_wanted_any_more_is_cancelled(config: EngineConfig) -> None:
    engine = EngineProcess(config, Launch([], {}), Patience(9, 9))
    task = await sending(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    await engine.kill()
