"""Work that engines have died over runs alone, so that what merely ran beside it is not blamed for the next death."""

from __future__ import annotations

import asyncio


class Quarantine:
    """Who is in an engine, over both lanes: any number together, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._somebody_alone = False
        self._waiting_alone = 0
        self._changed = asyncio.Event()

    async def enter(self, *, alone: bool, count: int = 1) -> None:
        """Wait until there is nobody else (`alone`), or nobody who is or wants to be alone; `count` enter at once."""
        self._waiting_alone += alone
        try:
            while self._must_wait(alone):
                await self._changed.wait()
        finally:
            self._waiting_alone -= alone
            self._tell()
        self._inside += count
        self._somebody_alone = alone

    def leave(self, *, count: int = 1) -> None:
        """Whoever entered has its outcome, or has lost its engine."""
        self._inside -= count
        self._somebody_alone = self._somebody_alone and self._inside > 0
        self._tell()

    def _must_wait(self, alone: bool) -> bool:
        return self._inside > 0 if alone else self._somebody_alone or self._waiting_alone > 0

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
