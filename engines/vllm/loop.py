"""vLLM's event loop in a thread of its own, and the sequences that are drawn in it.

The host calls the engine from one thread, vLLM draws in another: what has come lies in a queue, and a descriptor tells
the host that there is something in it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import select
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from engines.vllm.asking import Ask, Facts, Llm, Piece

T = TypeVar("T")

Key = tuple[int, int]
"""A sample's call_id and the number of a sequence in it."""
NOBODYS: Key = (-1, -1)
"""Stands for no sequence: what concerns all of them."""
News = tuple[Key, Piece | Exception]


class VllmLoop:
    """Draws sequences on an `Llm`. Every method but those of the loop's own is called from the engine's thread."""

    def __init__(self, llm: Llm) -> None:
        self._llm = llm
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._came: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._heard, self._bell = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(self._bell, False)
        self.passes = 0
        self._thread.start()

    @property
    def news(self) -> int:
        """Readable while `take` has something."""
        return self._heard

    def start(self) -> Facts:
        """Have the model loaded. Raises LoadError."""
        facts = self.wait_for(self._llm.start())
        self._loop.call_soon_threadsafe(self._watch)
        return facts

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that the loop does."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def drop_adapter(self, number: int) -> concurrent.futures.Future[None]:
        """Have vLLM let go of an adapter; what is begun after the future's end finds it gone."""
        return asyncio.run_coroutine_threadsafe(self._llm.drop_adapter(number), self._loop)

    def begin(self, key: Key, ask: Ask, after: concurrent.futures.Future[None] | None) -> None:
        """Draw a sequence, once `after` is done."""
        self._loop.call_soon_threadsafe(self._begin, key, ask, after)

    def cancel(self, key: Key) -> None:
        """Stop drawing a sequence; what has come of it before may still be in the queue."""
        self._loop.call_soon_threadsafe(self._cancel, key)

    def tell(self, key: Key, came: Piece | Exception) -> None:
        """Put something into the queue."""
        self._came.put((key, came))
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the host is told already
            os.write(self._bell, b".")

    def take(self, timeout_s: float) -> list[News]:
        """Everything that has come; waits for something at most so long."""
        select.select([self._heard], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):  # nothing has come
            os.read(self._heard, 1 << 16)
        found: list[News] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._came.get_nowait())
        return found

    def close(self) -> None:
        """End vLLM and the loop."""
        self.wait_for(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        os.close(self._heard)
        os.close(self._bell)

    # ------------------------------------------------------------------ in the loop

    async def _close(self) -> None:
        tasks = [*self._tasks.values(), *([self._watching] if self._watching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._llm.close()

    def _watch(self) -> None:
        self._watching = self._loop.create_task(self._tell_end())

    async def _tell_end(self) -> None:
        self.tell(NOBODYS, await self._llm.ended())

    def _begin(self, key: Key, ask: Ask, after: concurrent.futures.Future[None] | None) -> None:
        task = self._loop.create_task(self._draw(key, ask, after))
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def _cancel(self, key: Key) -> None:
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    async def _draw(self, key: Key, ask: Ask, after: concurrent.futures.Future[None] | None) -> None:
        try:
            if after is not None:
                await asyncio.shield(asyncio.wrap_future(after))  # others wait for it too
            async with contextlib.aclosing(self._llm.draw(ask)) as pieces:
                async for piece in pieces:
                    self.passes += 1
                    self.tell(key, piece)
        except Exception as error:  # boundary: the engine's thread gets it, and judges what it means
            self.tell(key, error)
