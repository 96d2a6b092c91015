"""What an engine process owes, and what is on its way to it, when it dies."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from engines.interface import EngineConfig
from gateway.engine_process import Drawn, EngineProcess
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


async def test_what_has_been_drawn_and_is_not_read_yet_is_not_what_it_died_over(config: EngineConfig) -> None:
    engine = EngineProcess(config, Launch([], {}), Patience(9, 9))
    engine._socket.connect(engine._address)  # nobody listens there, but what is sent need not wait
    done: list[str] = []
    finished, unfinished = (
        engine.sample(b"", "ada", on_drawn=partial(done.append, name)) for name in ("first", "second")
    )
    reading = [asyncio.create_task(anext(stream)) for stream in (finished, unfinished)]
    await asyncio.sleep(0.05)
    drawn = Drawn(b"", 1, 0, 1)
    engine._put(1, drawn)
    assert await asyncio.wait_for(reading[0], 10) == drawn
    assert done == ["first"]
    await engine.kill()
    assert done == ["first", "second"]
    assert engine.lost_samples == 1
    with pytest.raises(EngineLost, match="it was stopped"):
        await asyncio.wait_for(reading[1], 10)
    await finished.aclose()
