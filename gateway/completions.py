"""Telling a client which of its samples are finished, many in one answer, instead of one waiting request for each.

A *channel* is the samples of one sampler that one of its clients has numbered: `seq_id // BLOCK` is the client's. Its
queue is kept in memory from the first poll on and read again from the database by the first poll after a restart, so
nothing is lost and nothing is kept for clients that do not poll. A completion told twice is no harm; the SDK says so.

A client may poll several gateways in turn, with one cursor, and a gateway may learn late of what another has settled.
So a cursor says only for what was told here that it has arrived; what was not told here yet is told behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from itertools import islice

from gateway.store import Store
from gateway.store.records import Future, FutureStatus, Sampler

BLOCK = 10**9
"""Numbers that a client of a sampler has to itself; the first client has the first block."""
_LARGEST_PAGE = 4096
_LONGEST_QUEUE = 100_000
_IDLE_S = 900.0
_POLLED_S = 10.0
_OVERLAP_S = 60.0
"""How far before a cursor of an earlier process completions are told again: clocks may have been set."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample; `cursor` grows along the queue."""

    cursor: int
    request_id: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Poll:
    """What a client asks: completions of its numbers behind `cursor`; those of `retrieved` need not be told again."""

    sampler: Sampler
    client: int
    cursor: int
    retrieved: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Channel:
    """The queue of one client of one sampler. Cursors are microseconds, moved on where two would be equal."""

    poll: Poll
    """The first one here, for its sampler and client."""
    last: int
    queue: OrderedDict[str, Completion] = field(default_factory=OrderedDict)
    known: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """When each of those that came lately was finished, whether it has been told or not."""
    told: int = 0
    """The highest cursor that was told here."""
    polled_at: float = field(default_factory=time.monotonic)
    waiting: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, future: Future) -> None:
        if future.request_id in self.known:
            return
        finished_at = future.finished_at or 0.0
        self.known[future.request_id] = finished_at
        while (
            len(self.known) > _LARGEST_PAGE and next(iter(self.known.values())) < finished_at - 2 * _OVERLAP_S
        ):
            self.known.popitem(last=False)
        self.last = max(self.last + 1, int(finished_at * 1e6))
        failed = future.status is FutureStatus.FAILED
        self.queue[future.request_id] = Completion(self.last, future.request_id, failed)
        self.news.set()

    @property
    def since(self) -> float:
        """From when on samples may have been finished that are not known here."""
        cursor = self.poll.cursor
        newest = max(self.known.values(), default=min(cursor / 1e6, time.time()) if cursor else None)
        return newest - _OVERLAP_S if newest is not None else 0.0

    @property
    def is_polled(self) -> bool:
        return self.waiting > 0 or time.monotonic() - self.polled_at < _POLLED_S

    def trim(self, cursor: int, retrieved: frozenset[str]) -> None:
        for request_id in retrieved:
            self.queue.pop(request_id, None)
        while self.queue and (first := next(iter(self.queue.values()))).cursor <= cursor:
            self.queue.popitem(last=False)
            if first.cursor > self.told:  # the cursor is another gateway's, which may not have told this one
                self.last = max(self.last, cursor) + 1
                self.queue[first.request_id] = replace(first, cursor=self.last)

    def page(self) -> list[Completion]:
        found = list(islice(self.queue.values(), _LARGEST_PAGE))
        self.told = max(self.told, found[-1].cursor if found else 0)
        return found


class Completions:
    """The channels of all clients that poll this gateway process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._channels: dict[tuple[str, int], _Channel] = {}
        self._closing = False

    def add(self, future: Future) -> None:
        """A sample is finished: tell whoever polls for it. Called right after the commit."""
        if future.sampler_id is None:
            return
        key = (future.sampler_id, future.seq_id // BLOCK)
        channel = self._channels.get(key)
        if channel is None:
            return
        channel.add(future)
        if len(channel.queue) > _LONGEST_QUEUE and not channel.waiting:
            del self._channels[key]  # nobody fetches them: the database knows them too

    async def poll(self, poll: Poll, hold_s: float) -> list[Completion]:
        """What has been finished, the oldest first, waiting up to `hold_s` seconds for the first of it."""
        channel = await self._channel(poll)
        channel.polled_at = time.monotonic()
        channel.trim(poll.cursor, poll.retrieved)
        if not channel.queue and hold_s > 0 and not self._closing:
            await self._wait(channel, hold_s)
        return channel.page()

    def answer_waiters(self) -> None:
        """The process is about to end: nobody waits any longer."""
        self._closing = True
        for channel in self._channels.values():
            channel.news.set()

    def follows(self, request_id: str) -> bool:
        """Whether anybody polls here for samples of this one's sampler."""
        sampler_id = request_id.rpartition(":")[0]
        return any(key[0] == sampler_id for key in self._channels)

    async def look(self) -> None:
        """Find out what other processes have finished of what is polled for here."""
        for channel in [channel for channel in self._channels.values() if channel.is_polled]:
            await self._read(channel)

    async def _wait(self, channel: _Channel, hold_s: float) -> None:
        channel.news.clear()
        channel.waiting += 1
        try:
            # Not wait_for, which before Python 3.12 loses a cancellation that comes with what it waits for.
            async with asyncio.timeout(hold_s):
                await channel.news.wait()
        except TimeoutError:
            return
        finally:
            channel.waiting -= 1
            channel.polled_at = time.monotonic()

    async def _channel(self, poll: Poll) -> _Channel:
        key = (poll.sampler.sampler_id, poll.client)
        channel = self._channels.get(key)
        if channel is not None:
            return channel
        self._forget_idle()
        opened = _Channel(poll, poll.cursor)
        self._channels[key] = opened  # first, so that what ends while the database is read is not missed
        complete = False
        try:
            await self._read(opened)
            complete = True
        finally:
            if not complete:
                self._channels.pop(key, None)
        return opened

    async def _read(self, channel: _Channel) -> None:
        """Add what the database knows of a channel."""
        first = channel.poll.client * BLOCK
        found = await self._store.futures.finished_of_sampler(
            channel.poll.sampler, range(first, first + BLOCK), since=channel.since, limit=_LONGEST_QUEUE
        )
        for future in found:
            channel.add(future)

    def _forget_idle(self) -> None:
        """Channels that nobody has polled for long are read again when somebody does."""
        oldest = time.monotonic() - _IDLE_S
        idle = [
            key
            for key, channel in self._channels.items()
            if not channel.waiting and channel.polled_at < oldest
        ]
        for key in idle:
            del self._channels[key]
