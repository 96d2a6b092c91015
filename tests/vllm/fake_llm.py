"""An `Llm` without vLLM: every sequence gets tokens that follow from its prompt and adapter, one at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

from engines.vllm.asking import Ask, Facts, LlmDied, Piece

VOCABULARY = 50


class FakeLlm:
    """Token i of a sequence is (last of the prompt + number of the adapter + i + 1) mod the vocabulary; each waits for
    `step`, unless the model is `eager`."""

    def __init__(self, *, eager: bool = True) -> None:
        self.eager = eager
        self.asked: list[Ask] = []
        self.drawing: set[str] = set()
        self.ends: Counter[str] = Counter()
        """By how they ended: `done` or `aborted`."""
        self.loaded: list[int] = []
        self.most_loaded = 0
        self.dead = False
        self.closed = False
        self.broken: Exception | None = None
        self._steps = asyncio.Semaphore(0)
        self.asleep = False
        self.naps: list[str] = []
        """What was done with its memory, in order: `sleep`, `wake`."""
        self.held = asyncio.Event()
        """Falling asleep and waking take until it is set."""
        self.held.set()
        self.fails: str | None = None
        """Which of the two fails."""

    async def start(self) -> Facts:
        return Facts("Fake", VOCABULARY, 40, (0,), "cpu", "float32", {"fake": "1"})

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        assert not self.asleep
        self.asked.append(ask)
        self.drawing.add(ask.name)
        number = ask.adapter.number if ask.adapter is not None else 0
        if number and number not in self.loaded:
            self.loaded.append(number)
            self.most_loaded = max(self.most_loaded, len(self.loaded))
        how = "aborted"
        try:
            for i in range(ask.most_tokens):
                if not self.eager:
                    await self._steps.acquire()
                await asyncio.sleep(0)
                if self.dead:
                    raise LlmDied("it was killed")
                if self.broken is not None:
                    raise self.broken
                token = (ask.prompt[-1] + number + i + 1) % VOCABULARY
                last = token in ask.stop_tokens or i == ask.most_tokens - 1
                if last:
                    how = "done"
                yield self._piece(ask, token, last, first=i == 0)
                if last:
                    return
        finally:
            self.drawing.discard(ask.name)
            self.ends[how] += 1

    def _piece(self, ask: Ask, token: int, ends: bool, *, first: bool) -> Piece:
        top = tuple((rank, -float(rank) - 1) for rank in range(ask.top))
        prompt = None
        if first and ask.prompt_logprobs is not None:
            best = {rank: -float(rank) - 1 for rank in range(ask.prompt_logprobs)}
            prompt = [None, *({**best, own: best.get(own, -9.0)} for own in ask.prompt[1:])]
        return Piece([token], [-0.5], [top], ends, 3 if first else 0, prompt)

    def step(self, count: int = 1) -> None:
        """Let so many tokens be drawn; call it in the loop."""
        for _ in range(count):
            self._steps.release()

    async def ended(self) -> LlmDied:
        while not self.dead:  # noqa: ASYNC110 - a test sets it from another thread
            await asyncio.sleep(0.01)
        return LlmDied("it was killed")

    async def drop_adapter(self, number: int) -> None:
        assert not self.asleep
        await asyncio.sleep(0.01)
        self.loaded.remove(number)

    async def sleep(self) -> None:
        assert not self.drawing
        assert not self.asleep
        await self._take_time("sleep")
        self.asleep = True

    async def wake(self) -> None:
        assert self.asleep
        await self._take_time("wake")
        self.asleep = False

    async def _take_time(self, what: str) -> None:
        self.naps.append(what)
        await self.held.wait()
        if self.fails == what:
            raise RuntimeError("out of memory")

    async def close(self) -> None:
        self.closed = True
