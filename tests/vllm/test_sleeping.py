"""Falling asleep and waking, over a fake vLLM that refuses to be used asleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engines.interface import EngineBroken, EngineConfig, LoadError
from engines.vllm.asking import Ask, LlmDied, LoadedAdapter
from engines.vllm.builds import CPU
from engines.vllm.llm import AsyncVllm
from engines.vllm.options import read_options
from engines.vllm.sleeping import Sleeper
from tests.vllm.fake_llm import FakeLlm
from tests.vllm.test_engine import PATIENCE_S, Made

SOON_S = 0.05


def ask(name: str = "a", adapter: LoadedAdapter | None = None) -> Ask:
    return Ask(name, [1, 2, 3], 3, [], 0, None, "", adapter, b"", 0)


async def drawn(llm: Sleeper, name: str = "a", adapter: LoadedAdapter | None = None) -> list[int]:
    return [token async for piece in llm.draw(ask(name, adapter)) for token in piece.tokens]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 - the fake tells nobody
            await asyncio.sleep(0.005)


async def started(fake: FakeLlm, after_s: float = SOON_S) -> Sleeper:
    llm = Sleeper(fake, after_s)
    await llm.start()
    return llm


async def bounded(work: Awaitable[list[int]]) -> list[int]:
    return await asyncio.wait_for(work, PATIENCE_S)


async def test_it_sleeps_when_nothing_is_asked_and_wakes_for_the_next() -> None:
    fake = FakeLlm()
    llm = await started(fake)
    await until(lambda: llm.asleep)
    assert await bounded(drawn(llm)) == [4, 5, 6]
    await until(lambda: llm.asleep)
    assert fake.naps == ["sleep", "wake", "sleep"]
    assert llm.sleeps == 2
    await llm.close()


async def test_it_stays_awake_while_something_is_drawn_and_for_a_while_after() -> None:
    fake = FakeLlm(eager=False)
    llm = await started(fake)
    drawing = asyncio.ensure_future(drawn(llm))
    await asyncio.sleep(4 * SOON_S)
    assert fake.naps == []
    fake.step(3)
    await bounded(drawing)
    assert fake.naps == []
    await until(lambda: llm.asleep)
    await llm.close()


async def test_without_the_option_it_never_sleeps() -> None:
    fake = FakeLlm()
    llm = await started(fake, 0.0)
    await drawn(llm)
    await asyncio.sleep(2 * SOON_S)
    assert fake.naps == []
    await llm.close()


async def test_what_comes_while_it_falls_asleep_waits_and_wakes_it() -> None:
    fake = FakeLlm()
    fake.held.clear()
    llm = await started(fake)
    await until(lambda: fake.naps == ["sleep"])
    waiting = [asyncio.ensure_future(drawn(llm, name)) for name in "abc"]
    await asyncio.sleep(SOON_S)
    assert fake.asked == []  # nothing is asked of it while it falls asleep
    fake.held.set()
    assert await bounded(asyncio.gather(*waiting)) == [[4, 5, 6]] * 3  # type: ignore[arg-type, comparison-overlap]
    assert fake.naps == ["sleep", "wake"]  # once for all three
    await llm.close()


async def test_who_gives_up_while_it_wakes_leaves_it_in_order() -> None:
    fake = FakeLlm()
    llm = await started(fake)
    await until(lambda: llm.asleep)
    fake.held.clear()
    leaving, staying = (asyncio.ensure_future(drawn(llm, name)) for name in "ab")
    await until(lambda: fake.naps == ["sleep", "wake"])
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not staying.done()
    fake.held.set()
    assert await bounded(staying) == [4, 5, 6]
    assert fake.naps == ["sleep", "wake"]
    await until(lambda: llm.asleep)
    # The last one gives up, and it wakes all the same: and then sleeps again.
    fake.held.clear()
    leaving = asyncio.ensure_future(drawn(llm))
    await until(lambda: fake.naps[-1] == "wake")
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    fake.held.set()
    await until(lambda: llm.sleeps == 3)
    await llm.close()


async def test_an_adapter_is_dropped_awake_and_loaded_ones_are_there_after_a_sleep() -> None:
    fake = FakeLlm()
    llm = await started(fake)
    adapter = LoadedAdapter("f#7", 7, "/f")
    await drawn(llm, adapter=adapter)
    await until(lambda: llm.asleep)
    assert await bounded(drawn(llm, adapter=adapter)) == [11, 12, 13]
    assert fake.loaded == [7]
    await until(lambda: llm.asleep)
    await asyncio.wait_for(llm.drop_adapter(7), PATIENCE_S)  # the fake refuses it asleep
    assert fake.loaded == []
    await llm.close()


@pytest.mark.parametrize(("step", "words"), [("sleep", "does not fall asleep"), ("wake", "does not wake")])
async def test_one_that_gets_stuck_half_way_is_given_up(step: str, words: str) -> None:
    fake = FakeLlm()
    fake.fails = step
    llm = await started(fake)
    ended = asyncio.ensure_future(llm.ended())
    await until(lambda: fake.naps == ["sleep"])
    with pytest.raises(LlmDied, match=f"{words}: out of memory"):
        await bounded(drawn(llm))
    assert words in str(await asyncio.wait_for(ended, PATIENCE_S))
    await llm.close()


async def test_a_death_is_told_asleep_too() -> None:
    fake = FakeLlm()
    llm = await started(fake)
    await until(lambda: llm.asleep)
    fake.dead = True
    assert "it was killed" in str(await asyncio.wait_for(llm.ended(), PATIENCE_S))
    await llm.close()


async def test_its_end_waits_for_what_is_under_way() -> None:
    fake = FakeLlm()
    fake.held.clear()
    llm = await started(fake)
    await until(lambda: fake.naps == ["sleep"])
    closing = asyncio.ensure_future(llm.close())
    await asyncio.sleep(SOON_S)
    assert not fake.closed
    fake.held.set()
    await asyncio.wait_for(closing, PATIENCE_S)
    assert fake.closed


async def test_its_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.vllm.sleeping._LONGEST_CHANGE_S", SOON_S)
    fake = FakeLlm()
    fake.held.clear()
    llm = await started(fake)
    await until(lambda: fake.naps == ["sleep"])
    await asyncio.wait_for(llm.close(), PATIENCE_S)
    assert fake.closed


async def test_nothing_is_asked_of_it_after_its_end() -> None:
    fake = FakeLlm()
    llm = await started(fake)
    await until(lambda: llm.asleep)
    fake.held.clear()
    leaving = asyncio.ensure_future(drawn(llm))
    await until(lambda: fake.naps[-1] == "wake")
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    closing = asyncio.ensure_future(llm.close())
    await asyncio.sleep(0)
    fake.held.set()
    await asyncio.wait_for(closing, PATIENCE_S)
    await asyncio.sleep(4 * SOON_S)
    assert fake.naps == ["sleep", "wake"]  # it does not fall asleep again
    with pytest.raises(LlmDied, match="has been closed"):
        await bounded(drawn(llm))


# ---------------------------------------------------------------------------- the engine on it


def until_asleep(made: Made, times: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while made.engine.stats()["sleeps"] < times:
        assert time.monotonic() < deadline, "it does not fall asleep"
        time.sleep(0.01)


def test_an_engine_that_sleeps_answers_as_one_that_does_not(tmp_path: Path) -> None:
    made = Made(tmp_path, sleep_after_s=SOON_S)
    try:
        adapters = [made.adapter(name) for name in "abc"]  # for two places
        for call_id, adapter in enumerate(adapters, start=1):
            until_asleep(made, call_id)
            idle = not made.engine.sampling  # so nobody takes it for stuck
            made.start(call_id, adapter=adapter)
            assert (idle, made.engine.sampling) == (True, True)
            made.drain()
        assert [ask.adapter.number for ask in made.llm.asked if ask.adapter is not None] == [1, 2, 3]
        assert made.llm.loaded == [2, 3]  # it was woken to let go of the first
        until_asleep(made, 4)
        assert made.engine.stats()["asleep"]
    finally:
        made.engine.close()


def test_an_engine_that_cannot_wake_is_broken(tmp_path: Path) -> None:
    """The one that trains beside it has taken the memory: a new process says so when it cannot load."""
    made = Made(tmp_path, sleep_after_s=SOON_S)
    try:
        until_asleep(made, 1)
        made.llm.fails = "wake"
        made.start(1)
        with pytest.raises(EngineBroken, match="vLLM does not wake: out of memory"):
            made.drain()
    finally:
        made.engine.close()


def test_the_build_for_cpus_refuses_to_sleep() -> None:
    """Here also vLLM is not there: it is refused before that is found out."""
    config = EngineConfig("v", "vllm", "m", "m", ("sample",), "", 1)
    with pytest.raises(
        LoadError, match=r"options\.sleep_after_s is 60: .*its build for CPUs; leave the option out"
    ):
        AsyncVllm(config, read_options({"sleep_after_s": 60}), CPU)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(LoadError, match="sleep_after_s"):
        read_options({"sleep_after_s": bad})
