"""When an operation's turn is: at the number that its client gave it, or, without one, after all that came before it.

A turn belongs to what was sent first for it; a digest of that tells a repetition from another call.

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
class Turn:
    """Where a call stands in its log. One whose client does not number has a `key`, which says which call it is, and
    the next `number` that was free. `digest` is of what was sent; None: not known."""

    number: int
    key: str | None = None
    digest: bytes | None = None

    @staticmethod
    def of_sample(seq_id: int | None, key: str | None, digest: bytes) -> Turn:
        """A sample's turn. Samples have no order, so without a number any will do."""
        if seq_id is not None:
            return Turn(seq_id, digest=digest)
        key = key or str(uuid.uuid4())
        return Turn(int(_digest(key), 16) >> (128 - _SAMPLE_BITS), key, digest)


def digest_of(route: str, body: bytes) -> bytes:
    """128 bits of a call: its route and its body as it was sent, decompressed. What the server draws is not in it."""
    digest = hashlib.blake2b(route.encode(errors="replace") + b"\0", digest_size=16)
    digest.update(body)
    return digest.digest()


def request_id_of(log_id: str, turn: Turn) -> str:
    """The id of the future of an entry of a run's or sampler's log: a function of its natural key."""
    return f"{log_id}:{turn.number}" if turn.key is None else f"{log_id}:key-{_digest(turn.key)}"


def _digest(key: str) -> str:
    """128 bits of a client's key, in hex."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()[:32]


class Turns:
    """Gives turns to operations of runs; those without a number one at a time in each run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arriving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(
        self, run_id: str, seq_id: int | None, key: str | None, digest: bytes
    ) -> AsyncIterator[Turn]:
        """The turn of an operation that is submitted within. A key that was seen before leads to the first promise."""
        if seq_id is not None:
            yield Turn(seq_id, digest=digest)
            return
        lock = self._arriving.get(run_id)
        if lock is None:
            self._arriving[run_id] = lock = asyncio.Lock()
        async with lock:
            yield Turn(await self._store.futures.next_number(run_id), key or str(uuid.uuid4()), digest)
