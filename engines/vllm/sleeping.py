"""An idle vLLM gives its GPU memory to whoever trains beside it, and takes it back for the next request.

Asleep, vLLM keeps weights and loaded adapters in host memory, has forgotten what it had computed for prompts, and must
not be asked for anything. All of this happens in vLLM's event loop, so that there is one order of events: what comes
while it falls asleep waits until it sleeps, and then wakes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from engines.vllm.asking import Ask, Facts, Llm, LlmDied, Piece, SleepyLlm

log = logging.getLogger(__name__)

_LONGEST_CHANGE_S = 5.0
"""Seconds that vLLM's end waits for it to fall asleep or to wake."""


class Sleeper(Llm):
    """A vLLM that sleeps when nothing has been asked of it for `after_s` seconds; 0: never."""

    def __init__(self, llm: SleepyLlm, after_s: float) -> None:
        self._llm = llm
        self._after_s = after_s
        self._users = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._changing: asyncio.Task[None] | None = None
        """On its way into sleep or out of it. That cannot be stopped half way, whoever gives up meanwhile."""
        self._broken = asyncio.Event()
        self._cause = ""
        """Why it is not to be used any more."""
        self.asleep = False
        self.sleeps = 0
        """How often it has fallen asleep."""

    async def start(self) -> Facts:
        facts = await self._llm.start()
        self._set_alarm()
        return facts

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        async with self._awake(), aclosing(self._llm.draw(ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def drop_adapter(self, number: int) -> None:
        async with self._awake():  # for it changes what lies on the GPU
            await self._llm.drop_adapter(number)

    async def ended(self) -> LlmDied:
        died = asyncio.ensure_future(self._llm.ended())
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({died, broken}, return_when=asyncio.FIRST_COMPLETED)
            return LlmDied(self._cause) if broken.done() else died.result()
        finally:
            died.cancel()
            broken.cancel()

    async def close(self) -> None:
        """End vLLM; what it is asked from then on raises LlmDied."""
        self._cause = self._cause or "vLLM has been closed"
        self._stop_alarm()
        if (changing := self._changing) is not None:
            await asyncio.wait({changing}, timeout=_LONGEST_CHANGE_S)
            changing.cancel()
        await self._llm.close()

    @asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        """For as long as somebody is in here it is awake. Raises LlmDied."""
        self._users += 1
        self._stop_alarm()
        try:
            while self._changing is not None or self.asleep or self._cause:
                if self._cause:
                    raise LlmDied(self._cause)
                if self._changing is None:
                    self._change(self._llm.wake, asleep=False)
                else:
                    await asyncio.shield(self._changing)
            yield
        finally:
            self._users -= 1
            self._set_alarm()

    def _set_alarm(self) -> None:
        if self._after_s and not self._users and not self.asleep and not self._cause:
            self._stop_alarm()
            self._alarm = asyncio.get_running_loop().call_later(self._after_s, self._fall_asleep)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _fall_asleep(self) -> None:
        if not self._users and self._changing is None and not self.asleep and not self._cause:
            self._change(self._llm.sleep, asleep=True)

    def _change(self, change: Callable[[], Awaitable[None]], *, asleep: bool) -> None:
        self._changing = asyncio.get_running_loop().create_task(self._changed(change, asleep=asleep))

    async def _changed(self, change: Callable[[], Awaitable[None]], *, asleep: bool) -> None:
        try:
            await change()
            self.asleep = asleep
            self.sleeps += asleep
            log.info("vLLM %s", "sleeps, for nothing was asked of it" if asleep else "is awake again")
        except (
            Exception
        ) as error:  # boundary: half asleep it draws nonsense, so the process ends and is replaced
            self._cause = f"vLLM does not {'fall asleep' if asleep else 'wake'}: {error}"
            self._broken.set()
        finally:
            self._changing = None
            self._set_alarm()  # whoever woke it may have given up
