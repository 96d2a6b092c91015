"""When an operation's turn is: at the number that its client gave it, or, without one, after all that came before it.

SDKs up to 0.2 number nothing. They send the operations of a run one after the other, each with an idempotency key that
stays the same when it is sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from gateway.store import Store

_SAMPLE_BITS = 63


@dataclass(frozen=True, slots=True)
class Arrival:
    """An operation without a number: `number` is the next one that was free, `key` says which call it is."""

    number: int
    key: str

    @staticmethod
    def of_sample(key: str | None) -> Arrival:
        """A sample without a number. Samples have no order, so any number will do."""
        key = key or str(uuid.uuid4())
        return Arrival(int(_digest(key), 16) >> (128 - _SAMPLE_BITS), key)


Turn = int | Arrival


def number_of(turn: Turn) -> int:
    """Where it stands in its log."""
    return turn.number if isinstance(turn, Arrival) else turn


def request_id_of(log_id: str, turn: Turn) -> str:
    """The id of the future of an entry of a run's or sampler's log: a function of its natural key."""
    return f"{log_id}:{turn}" if isinstance(turn, int) else f"{log_id}:key-{_digest(turn.key)}"


def _digest(key: str) -> str:
    """128 bits of a client's key, in hex."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()[:32]


class Turns:
    """Gives turns to operations of runs; those without a number one at a time in each run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arriving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, run_id: str, seq_id: int | None, key: str | None) -> AsyncIterator[Turn]:
        """The turn of an operation that is submitted within. A key that was seen before leads to the first promise."""
        if seq_id is not None:
            yield seq_id
            return
        lock = self._arriving.get(run_id)
        if lock is None:
            self._arriving[run_id] = lock = asyncio.Lock()
        async with lock:
            yield Arrival(await self._store.futures.next_number(run_id), key or str(uuid.uuid4()))
