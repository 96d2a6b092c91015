"""How work in the background leaves the database's only writer to those who wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_REST = 4.0
"""Seconds of rest for each second of a batch: all of this together takes a fifth of the writer's time at most."""


class Pace:
    """Batches of whichever kind, one at a time, each with a rest behind it."""

    def __init__(self) -> None:
        self._working = asyncio.Lock()

    async def batch(self, work: Callable[[], Awaitable[T]]) -> T:
        """Perform a batch of some milliseconds in its turn, and rest."""
        async with self._working:
            began = time.monotonic()
            answer = await work()
            await asyncio.sleep(_REST * (time.monotonic() - began))
        return answer
