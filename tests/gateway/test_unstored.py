"""What goes out of a sample that is drawn again, over engines that a test makes up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engines.messages import SampleDelta
from engines.operations import SampledSequence, SampleRequest, SampleResult, encode
from engines.tensors import Tensor
from engines.vitals import Doing, Signs
from gateway.engine_process import Drawn
from gateway.errors import EngineDiedOverIt, EngineLost, EngineUnavailable, TandemError
from gateway.fleet import Fleet, Needs
from gateway.settings import Settings
from gateway.unstored import Asked, Unstored

Event = SampleDelta | Drawn
PATIENCE_S = 30.0
PROMPT = Tensor.of(np.array([65, 66], dtype=np.int32))


def delta(sequence: int, *tokens: int) -> SampleDelta:
    tops = [[(token, -1.0)] for token in tokens]
    return SampleDelta(1, sequence, list(tokens), [-float(token) for token in tokens], tops)


def whole(*sequences: list[int]) -> Drawn:
    found = [
        SampledSequence(
            Tensor.of(np.array(tokens, dtype=np.int32)),
            Tensor.of(np.zeros(len(tokens), dtype=np.float32)),
            "length",
        )
        for tokens in sequences
    ]
    return Drawn(encode(SampleResult(found)), 2, 0, sum(map(len, sequences)))


class Life:
    """One life of the engine: what it says until it dies, among so many samples, doing that."""

    def __init__(
        self, *events: Event, dies: bool = True, among: int = 3, doing: Doing = Doing.SAMPLING
    ) -> None:
        self._events = events
        self._dies = dies
        self.lost_samples = among
        self.last_signs = Signs(1, (1, 1), doing, 0)
        self.abandoned = False

    async def sample(
        self, body: bytes, party: str, *, stream: bool, on_drawn: Callable[[], None]
    ) -> AsyncGenerator[Event, None]:
        on_drawn()  # an engine does not wait for who reads
        for event in self._events:
            yield event
        await asyncio.sleep(0)
        if self._dies:
            raise EngineLost("killed")


class Endless(Life):
    """One that is still drawing."""

    async def sample(
        self, body: bytes, party: str, *, stream: bool, on_drawn: Callable[[], None]
    ) -> AsyncGenerator[Event, None]:
        yield delta(0, 7)
        yield delta(0, 8)
        await asyncio.Event().wait()


class LivesOfAnEngine:
    """Fleet, dispatcher and supervisor of one engine: between two lives it is away for a moment."""

    def __init__(self, *lives: Life | TandemError) -> None:
        self._lives = list(lives)
        self.supervisor = self
        self.looks = 0
        self.expected = 0

    def route(self, *_: Any, **__: Any) -> LivesOfAnEngine:
        return self

    @property
    def coming_back(self) -> bool:
        self.looks += 1
        return self.looks % 2 == 1

    def now(self) -> Life:
        life = self._lives.pop(0)
        if isinstance(life, TandemError):
            raise life
        return life

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        self.expected += 1
        yield
        self.expected -= 1


def asked(owner: str) -> Asked:
    return Asked(owner, "m", Needs(), SampleRequest(PROMPT, num_samples=2, seed=1), stream=True)


async def shown(tmp_path: Path, engine: LivesOfAnEngine, **settings: Any) -> AsyncGenerator[Event, None]:
    unstored = Unstored(cast(Fleet, engine), Settings(data_dir=tmp_path, **settings))
    async for event in unstored.draw(asked("ada")):
        assert engine.expected == 1
        yield event


async def test_what_has_gone_out_does_not_go_out_again(tmp_path: Path) -> None:
    engine = LivesOfAnEngine(
        Life(delta(0, 7), delta(1, 8), delta(0, 9, 10)),
        Life(delta(0, 7, 9), delta(1, 8, 20), delta(0, 10)),
        Life(
            delta(1, 8),
            delta(0, 7, 9, 10, 11),
            delta(1, 20, 21),
            whole([7, 9, 10, 11], [8, 20, 21]),
            dies=False,
        ),
    )
    found = [event async for event in shown(tmp_path, engine)]
    assert found[:3] == [delta(0, 7), delta(1, 8), delta(0, 9, 10)]
    assert found[3:-1] == [delta(1, 20), delta(0, 11), delta(1, 21)]
    assert found[-1] == whole([7, 9, 10, 11], [8, 20, 21])
    assert engine.expected == 0


@pytest.mark.parametrize(
    "second", [Life(delta(0, 7, 12)), Life(delta(0, 7), whole([7, 12]), dies=False)], ids=["delta", "result"]
)
async def test_a_stream_that_cannot_be_continued_ends(tmp_path: Path, second: Life) -> None:
    engine = LivesOfAnEngine(Life(delta(0, 7), delta(0, 9)), second)
    found = []
    with pytest.raises(EngineLost, match="other tokens came"):
        async for event in shown(tmp_path, engine):
            found.append(event)
    assert found == [delta(0, 7), delta(0, 9)]


async def test_the_wait_ends_with_the_reason_when_no_engine_comes_back(tmp_path: Path) -> None:
    engine = LivesOfAnEngine(Life(), EngineUnavailable("it fails to start"))
    with pytest.raises(EngineUnavailable, match="it fails to start"):
        [event async for event in shown(tmp_path, engine)]
    assert engine.expected == 0


async def test_the_wait_has_an_end(tmp_path: Path) -> None:
    class Gone(LivesOfAnEngine):
        coming_back = True

    engine = Gone(EngineUnavailable("it is starting"))
    with pytest.raises(EngineUnavailable, match="it is starting"):
        [event async for event in shown(tmp_path, engine, engine_start_timeout_s=0.1)]


async def test_one_that_died_and_is_not_known_to_have_ended_is_not_used(tmp_path: Path) -> None:
    class Dead(LivesOfAnEngine):
        coming_back = True

        def now(self) -> Life:
            return Life()

    with pytest.raises(EngineUnavailable, match="has died"):
        [event async for event in shown(tmp_path, Dead(), engine_start_timeout_s=0.1)]


@pytest.mark.parametrize("away", [True, False], ids=["soon back", "another at once"])
async def test_deaths_over_other_work_have_an_end_too(tmp_path: Path, away: bool) -> None:
    """A trainer kills each engine."""

    class KilledForEver(LivesOfAnEngine):
        lives = 0

        @property
        def coming_back(self) -> bool:
            return away and super().coming_back

        def now(self) -> Life:
            self.lives += 1
            return Life(doing=Doing.TRAINING)

    engine = KilledForEver()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineUnavailable, match="not drawn within 1 s, for engines of m died"):
            [event async for event in shown(tmp_path, engine, engine_start_timeout_s=1)]
    assert engine.lives > 1
    assert engine.expected == 0


async def both_suspected(
    tmp_path: Path, alone: Life, **settings: Any
) -> tuple[AsyncGenerator[Event, None], AsyncGenerator[Event, None]]:
    """Samples of two owners over which an engine has died; the first has its turn, and has been read once."""
    engine = LivesOfAnEngine(
        Life(delta(0, 7)), Life(delta(0, 7)), alone, Life(delta(0, 7), whole([7], [9]), dies=False)
    )
    unstored = Unstored(cast(Fleet, engine), Settings(data_dir=tmp_path, **settings))
    adas, bobs = (unstored.draw(asked(owner)) for owner in ("ada", "bob"))
    for stream in (adas, bobs):
        assert await anext(stream) == delta(0, 7)
    assert await anext(adas) == delta(0, 8)
    return adas, bobs


async def test_a_client_that_does_not_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    alone = Life(delta(0, 7), delta(0, 8), whole([7, 8], [9]), dies=False)
    adas, bobs = await both_suspected(tmp_path, alone)
    async with asyncio.timeout(PATIENCE_S):
        assert await anext(bobs) == whole([7], [9])
    assert await anext(adas) == whole([7, 8], [9])


async def test_the_wait_for_a_turn_has_an_end(tmp_path: Path) -> None:
    adas, bobs = await both_suspected(tmp_path, Endless(), engine_start_timeout_s=1)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineUnavailable, match="turn has not come"):
            await anext(bobs)
    await adas.aclose()


async def test_over_what_it_was_alone_with_few_engines_die(tmp_path: Path) -> None:
    engine = LivesOfAnEngine(Life(among=300), Life(among=1), Life(dies=False))
    with pytest.raises(EngineDiedOverIt, match="the engine died 2 times"):
        [event async for event in shown(tmp_path, engine)]


async def test_what_is_never_alone_has_more_lives_and_an_end(tmp_path: Path) -> None:
    engine = LivesOfAnEngine(*[Life() for _ in range(4)], Life(whole([1], [2]), dies=False))
    assert [event async for event in shown(tmp_path, engine)] == [whole([1], [2])]
    with pytest.raises(EngineDiedOverIt, match="5 times"):
        [event async for event in shown(tmp_path, LivesOfAnEngine(*[Life() for _ in range(5)]))]


async def test_deaths_over_something_else_do_not_count(tmp_path: Path) -> None:
    given_up = Life(among=1)
    given_up.abandoned = True
    lives = [
        *[Life(among=1, doing=Doing.TRAINING) for _ in range(6)],
        given_up,
        Life(whole([1], [2]), dies=False),
    ]
    assert [event async for event in shown(tmp_path, LivesOfAnEngine(*lives))] == [whole([1], [2])]
