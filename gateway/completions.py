"""Telling a client which of its samples are finished, many in one answer, instead of one waiting request for each.

A *channel* is the samples of one sampler that one of its clients has numbered: `seq_id // BLOCK` is the client's. Its
queue is kept in memory from the first poll on and read again from the database by the first poll after a restart, so
nothing is lost and nothing is kept for clients that do not poll. A completion told twice is no harm; the SDK says so.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from gateway.store import Store
from gateway.store.records import Future, FutureStatus, Sampler

BLOCK = 10**9
"""Numbers that a client of a sampler has to itself; the first client has the first block."""
_LARGEST_PAGE = 4096
_LONGEST_QUEUE = 100_000
_IDLE_S = 900.0
_OVERLAP_S = 60.0
"""How far before a cursor of an earlier process completions are told again: clocks may have been set."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample; `cursor` grows along the queue."""

    cursor: int
    request_id: str
    failed: bool


@dataclass(slots=True)
class _Channel:
    """The queue of one client of one sampler. Cursors are microseconds, moved on where two would be equal."""

    last: int
    queue: OrderedDict[str, Completion] = field(default_factory=OrderedDict)
    polled_at: float = field(default_factory=time.monotonic)
    waiting: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, future: Future) -> None:
        if future.request_id in self.queue:
            return
        self.last = max(self.last + 1, int((future.finished_at or 0.0) * 1e6))
        failed = future.status is FutureStatus.FAILED
        self.queue[future.request_id] = Completion(self.last, future.request_id, failed)
        self.news.set()

    def trim(self, cursor: int, retrieved: frozenset[str]) -> None:
        while self.queue and next(iter(self.queue.values())).cursor <= cursor:
            self.queue.popitem(last=False)
        for request_id in retrieved:
            self.queue.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class Poll:
    """What a client asks: completions of its numbers behind `cursor`; those of `retrieved` need not be told again."""

    sampler: Sampler
    client: int
    cursor: int
    retrieved: frozenset[str] = frozenset()


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
        return list(islice(channel.queue.values(), _LARGEST_PAGE))

    def answer_waiters(self) -> None:
        """The process is about to end: nobody waits any longer."""
        self._closing = True
        for channel in self._channels.values():
            channel.news.set()

    async def _wait(self, channel: _Channel, hold_s: float) -> None:
        channel.news.clear()
        channel.waiting += 1
        try:
            await asyncio.wait_for(channel.news.wait(), hold_s)
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
        opened = _Channel(poll.cursor)
        self._channels[key] = opened  # first, so that what ends while the database is read is not missed
        complete = False
        try:
            for future in await self._finished(poll):
                opened.add(future)
            complete = True
        finally:
            if not complete:
                self._channels.pop(key, None)
        return opened

    async def _finished(self, poll: Poll) -> list[Future]:
        """What the database knows of a channel behind a cursor."""
        numbers = range(poll.client * BLOCK, (poll.client + 1) * BLOCK)
        since = min(poll.cursor / 1e6, time.time()) - _OVERLAP_S if poll.cursor else 0.0
        return await self._store.futures.finished_of_sampler(
            poll.sampler, numbers, since=since, limit=_LONGEST_QUEUE
        )

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
