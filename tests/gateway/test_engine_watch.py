"""When an engine process is given up, by what its page says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from engines.vitals import Doing, Vitals
from gateway.engine_watch import Patience, until_condemned

SILENCE_S = 0.25


@pytest.fixture
def vitals() -> Iterator[Vitals]:
    page = Vitals.create()
    yield page
    page.close()


async def verdict(
    vitals: Vitals, within_s: float, hang_s: float = 100.0, beat: Callable[[], None] | None = None
) -> str | None:
    """What the watch says within some time, while the page beats as told; None if it has no complaint."""

    async def beating() -> None:
        while beat is not None:
            beat()
            await asyncio.sleep(0.01)

    heart = asyncio.create_task(beating())
    try:
        return await asyncio.wait_for(until_condemned(vitals, Patience(SILENCE_S, hang_s)), within_s)
    except TimeoutError:
        return None
    finally:
        heart.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await heart


async def test_one_that_beats_is_left_alone_however_long_it_is_idle(vitals: Vitals) -> None:
    assert await verdict(vitals, 1.0, 0.3, lambda: vitals.beat(0)) is None


async def test_silence_ends_it_in_a_call_and_between_two(vitals: Vitals) -> None:
    vitals.beat(0)
    began = time.monotonic()
    assert await verdict(vitals, 5.0) == "it has given no sign of life for 0.25 s"
    assert SILENCE_S <= time.monotonic() - began < 4 * SILENCE_S
    with vitals.during(Doing.TRAINING):
        assert await verdict(vitals, 5.0) == "it has given no sign of life for 0.25 s"


async def test_four_times_as_long_a_silence_is_borne_while_it_starts(vitals: Vitals) -> None:
    assert await verdict(vitals, 3 * SILENCE_S) is None
    vitals.beat(0)
    with vitals.during(Doing.LOADING):
        assert await verdict(vitals, 3 * SILENCE_S) is None
        assert await verdict(vitals, 10.0) == "it has given no sign of life for 1 s"


@pytest.mark.parametrize(
    ("doing", "words"),
    [
        (Doing.TRAINING, "call"),
        (Doing.REPLAYING, "restoration of a run"),
        (Doing.SAMPLING, "decoding step"),
    ],
)
async def test_a_call_that_gets_no_further_ends_it(vitals: Vitals, doing: Doing, words: str) -> None:
    with vitals.during(doing):
        cause = await verdict(vitals, 5.0, 0.3, lambda: vitals.beat(4))
    assert cause == f"its {words} has made no progress for 0.3 s"


async def test_passes_are_progress_and_so_are_new_calls(vitals: Vitals) -> None:
    passes = iter(range(10**6))
    with vitals.during(Doing.TRAINING):
        assert await verdict(vitals, 1.0, 0.3, lambda: vitals.beat(next(passes))) is None

    def one_step_after_the_other() -> None:
        vitals.beat(0)
        with vitals.during(Doing.SAMPLING):
            pass

    with vitals.during(Doing.SAMPLING):
        assert await verdict(vitals, 1.0, 0.3, one_step_after_the_other) is None


async def test_a_long_load_is_no_hang(vitals: Vitals) -> None:
    with vitals.during(Doing.LOADING):
        assert await verdict(vitals, 1.0, 0.3, lambda: vitals.beat(0)) is None


async def test_a_gateway_that_was_stopped_itself_blames_no_engine(vitals: Vitals) -> None:
    """The page has not been looked at meanwhile, which is no silence of the engine's."""
    vitals.beat(0)
    stopped = False

    def beat() -> None:
        nonlocal stopped
        vitals.beat(0)
        if not stopped:
            stopped = True
            time.sleep(4 * SILENCE_S)

    assert await verdict(vitals, 1.0, beat=beat) is None
