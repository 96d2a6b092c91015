"""Samples that are not stored: OpenAI's requests, drawn to their end although engines die.

A token is a function of seed, sequence and position. So a sample whose engine has died is drawn again, by another
engine or by the same one when it is back, and gives the same tokens. What its client has of them already is left out;
an engine whose logits differ in the last digit may draw another token some day, and then the stream ends, for it cannot
be made whole.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import NamedTuple

import msgspec

from engines.messages import SampleDelta
from engines.operations import SampleRequest, SampleResult, decode_result, encode
from gateway.dispatch import Dispatcher
from gateway.dispatch.blame import Deaths
from gateway.engine_process import Drawn, EngineProcess
from gateway.errors import EngineDiedOverIt, EngineElsewhere, EngineLost, EngineUnavailable
from gateway.fleet import Fleet, Needs
from gateway.settings import Settings

log = logging.getLogger(__name__)

_FIRST_LOOK_S = 0.05
_LONGEST_LOOK_S = 1.0
"""Seconds between looks for an engine that is started again; they double."""


class Asked(NamedTuple):
    """A sample, who asked for it, and what may draw it."""

    owner: str
    base_model: str
    needs: Needs
    request: SampleRequest
    stream: bool


class Unstored:
    """Has samples drawn that no queue has."""

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet = fleet
        self._settings = settings
        self._lines: dict[str, asyncio.Lock] = {}

    async def draw(self, asked: Asked) -> AsyncGenerator[SampleDelta | Drawn, None]:
        """The deltas as they come, if it is a stream, then what has been drawn. Closing it cancels the sample.

        Raises what `EngineProcess.sample` raises but for most deaths of engines; EngineUnavailable when none comes
        back in time; EngineDiedOverIt; EngineLost when what is drawn again differs from what has gone out.
        """
        deaths = Deaths(self._settings.max_attempts)
        patience = _Patience(self._settings.engine_start_timeout_s)
        sent = _Sent()
        body = encode(asked.request)
        whole = False
        while not whole and not deaths.worn_out:
            async with (
                self._engine(asked, deaths, patience) as (engine, on_drawn),
                aclosing(engine.sample(body, asked.owner, stream=asked.stream, on_drawn=on_drawn)) as events,
            ):
                async for event in events:
                    if (new := sent.new(event)) is not None:
                        yield new
                whole = True
            sent.begin_again()
        if whole:
            return
        error_id = secrets.token_hex(6)
        log.error("error %s: a sample that is not stored failed: %s", error_id, deaths.told)
        raise EngineDiedOverIt(f"{deaths.told}; the server's log has it under the error id {error_id}")

    @asynccontextmanager
    async def _engine(
        self, asked: Asked, deaths: Deaths, patience: _Patience
    ) -> AsyncIterator[tuple[EngineProcess, Callable[[], None]]]:
        """The one that draws it, and what to call when that has been done. If it dies, its death is counted, and what
        was to be done with it ends."""
        if patience.over:
            raise EngineUnavailable(
                f"this was not drawn within {self._settings.engine_start_timeout_s:.0f} s, for engines of "
                f"{asked.base_model} died or were away; try again later"
            )
        with ExitStack() as turn, ExitStack() as use:
            if deaths.suspected:  # one by one, so that what kills engines is found
                turn.callback((await self._turn(asked.base_model, patience)).release)
            dispatcher, engine = await self._ready(asked, patience)
            use.enter_context(dispatcher.expecting())
            try:
                yield engine, turn.close  # which need not wait for a client that takes its time to read
            except _Contradiction:
                raise
            except EngineLost as error:
                log.debug("a sample that is not stored is drawn again: %s", error)
                patience.begin()
                if not engine.abandoned:
                    deaths.count(engine.last_signs, engine.lost_samples)

    async def _turn(self, base_model: str, patience: _Patience) -> asyncio.Lock:
        """What is held by the only one of its suspects that is drawn. Raises EngineUnavailable."""
        line = self._lines.setdefault(base_model, asyncio.Lock())
        try:
            async with asyncio.timeout_at(patience.end):
                await line.acquire()
        except TimeoutError as error:
            raise EngineUnavailable(
                f"an engine of {base_model} died over several requests, which are repeated one by one, and this one's "
                "turn has not come; try again later"
            ) from error
        return line

    async def _ready(self, asked: Asked, patience: _Patience) -> tuple[Dispatcher, EngineProcess]:
        """The engine that draws it. One that has been ready before is waited for."""
        pause = _FIRST_LOOK_S
        while True:
            dispatcher = self._fleet.route(
                asked.base_model, asked.needs, asked.request, here=True, param="model"
            )
            away = dispatcher.supervisor.coming_back
            if not away or patience.over:
                return dispatcher, _now(dispatcher, away=away)
            patience.begin()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)


def _now(dispatcher: Dispatcher, *, away: bool) -> EngineProcess:
    """Its engine. Raises EngineUnavailable, also while it is away and only its supervisor does not know yet."""
    try:
        engine = dispatcher.supervisor.now()
    except EngineElsewhere as error:
        raise EngineUnavailable(
            "the engine of this model is just moving between gateways; try again in a moment"
        ) from error
    if away:
        raise EngineUnavailable("the engine of this model has died; try again in a moment")
    return engine


class _Patience:
    """How long a request waits in all for engines and for its turn: so many seconds from where it first had to."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.end = math.inf
        """By the loop's time."""

    def begin(self) -> None:
        """It has to wait; more than once is no error."""
        if self.end == math.inf:
            self.end = asyncio.get_running_loop().time() + self._seconds

    @property
    def over(self) -> bool:
        """Whether it is not drawn again, and no engine waited for."""
        return asyncio.get_running_loop().time() > self.end


class _Contradiction(EngineLost):
    """What has gone out cannot be continued."""


class _Sent:
    """What a client has of each sequence, and how much of that has been drawn again."""

    def __init__(self) -> None:
        self._tokens: dict[int, array[int]] = {}
        self._drawn: Counter[int] = Counter()
        self._again = False

    def begin_again(self) -> None:
        """Everything is drawn once more, from its first token on."""
        self._drawn.clear()
        self._again = True

    def new(self, event: SampleDelta | Drawn) -> SampleDelta | Drawn | None:
        """What an event has that the client does not; None: nothing. Raises EngineLost when it contradicts."""
        if isinstance(event, Drawn):
            if self._again and self._tokens:
                self._compare(event)
            return event
        sent = self._tokens.setdefault(event.sequence, array("i"))
        begin = self._drawn[event.sequence]
        self._drawn[event.sequence] += len(event.tokens)
        known = len(sent[begin : begin + len(event.tokens)])
        _require_equal(sent[begin : begin + known], array("i", event.tokens[:known]))
        sent.extend(event.tokens[known:])
        if not known:
            return event
        if known == len(event.tokens):
            return None
        return msgspec.structs.replace(
            event,
            tokens=event.tokens[known:],
            logprobs=event.logprobs[known:],
            top_logprobs=event.top_logprobs[known:],
        )

    def _compare(self, drawn: Drawn) -> None:
        result = decode_result(drawn.body)
        assert isinstance(result, SampleResult)
        for sequence, sent in self._tokens.items():
            tokens = result.sequences[sequence].tokens.array().tolist()
            _require_equal(sent, array("i", tokens[: len(sent)]))


def _require_equal(sent: array[int], drawn: array[int]) -> None:
    if sent != drawn:
        raise _Contradiction(
            "the engine died in the middle of this answer, and other tokens came when it was drawn again; send the "
            "request again"
        )
