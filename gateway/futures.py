"""Accepting calls and waiting for what becomes of them.

Waiting happens in memory: a settled future wakes whoever waits for it, with its result at hand. Only what was settled
longer ago is read from the database, and what another process settles: that one's notices say when, and `look` finds
out, some seconds later, if a notice was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator

from gateway.errors import BadRequest, Gone, NotFound, NumberTaken, StoreUnavailable, TandemError
from gateway.store import Store
from gateway.store.futures import Submission
from gateway.store.notices import Notice
from gateway.store.records import Future, FutureStatus, Settled
from gateway.store.usage import session_of_id

_READ_AT_A_TIME = 32
"""Outcomes; each may be some megabytes."""
_ATTENTIVE_S = 5.0
"""Seconds between looks whether there is still somebody who waits; they cost no read."""


async def _never() -> bool:
    return False


def _all_held(engine: str) -> bool:
    return True


class Futures:
    """The accepted calls of this gateway process. `on_accepted` hands each to its engine's dispatcher, with its
    input where that is at hand; `held` says of an engine whether this process dispatches for it. Futures are kept for
    `kept_s` seconds at least."""

    def __init__(
        self,
        store: Store,
        on_accepted: Callable[[Future, bytes | None], None],
        cache_bytes: int,
        held: Callable[[str], bool] = _all_held,
        kept_s: float = math.inf,
    ) -> None:
        self._store = store
        self._on_accepted = on_accepted
        self._held = held
        self._kept_s = kept_s
        self._recent = RecentlySettled(cache_bytes)
        self._waiters: dict[str, set[asyncio.Future[Settled]]] = {}
        self._open: dict[str, Future] = {}
        self._closing = False

    def knows(self, request_id: str) -> bool:
        """Whether this call has been accepted here and is open, or was settled lately."""
        return self._known(request_id) is not None

    async def find(self, request_id: str) -> Future | None:
        """The record of a call as it was accepted."""
        known = self._open.get(request_id)
        return known if known is not None else await self._store.futures.get(request_id)

    async def submit(self, submission: Submission) -> None:
        """Returns when the call is durable. A repeated submit of the same natural key is the first one.

        Raises NumberTaken when the first one was another call.
        """
        future = submission.future
        if (known := self._known(future.request_id)) is not None:
            require_same(known, future.kind, future.digest)
            return
        elsewhere = future.open and not self._held(future.engine)
        new = await self._store.futures.submit(
            submission,
            lambda new: self._accepted(future, submission.body) if new else None,
            Notice("accepted", future.request_id, future.engine) if elsewhere else None,
        )
        if not new:
            known = self._known(future.request_id) or await self._adopt(future.request_id)
            require_same(known, future.kind, future.digest)

    def _known(self, request_id: str) -> Future | None:
        """Without a look into the database."""
        settled = self._recent.get(request_id)
        return self._open.get(request_id) or (settled.future if settled is not None else None)

    async def _adopt(self, request_id: str) -> Future:
        """A first try was committed, but its answer was lost on the way from the database: it has to be dispatched."""
        stored = await self._store.futures.get(request_id)
        if stored is None and ":key-" in request_id:
            raise StoreUnavailable("another gateway has just given this operation's number away; try again")
        if stored is None:
            raise BadRequest(
                "this number is taken by another operation of the run; one client at a time numbers a run's operations",
                param="seq_id",
            )
        if stored.open and self._known(request_id) is None:  # else it was settled while it was read
            self._accepted(stored, None)
        return stored

    async def outcome(
        self, request_id: str, owner: str, hold_s: float, gone: Callable[[], Awaitable[bool]] = _never
    ) -> Settled | None:
        """The outcome, waiting for it up to `hold_s` seconds; None if it is still open then, or if `gone` says that
        nobody waits any longer.

        Raises NotFound for a future that does not exist or is somebody else's, Gone for one that is not kept any more.
        """
        settled = self._recent.get(request_id)
        if settled is None:
            settled = await self._wait(request_id, owner, hold_s, gone)
        if settled is not None and settled.future.owner != owner:
            raise _unknown(request_id)
        return settled

    def settled(self, settled: Settled | None) -> None:
        """Wake who waits. Called right after the commit."""
        if settled is None:
            return
        request_id = settled.future.request_id
        self._open.pop(request_id, None)
        self._recent.add(settled)
        for waiter in self._waiters.pop(request_id, ()):
            if not waiter.done():
                waiter.set_result(settled)

    def awaits(self, request_ids: Collection[str]) -> bool:
        """Whether any of these is waited for or open here."""
        return any(request_id in self._waiters or request_id in self._open for request_id in request_ids)

    async def look(self, request_ids: Collection[str] | None = None) -> None:
        """Find out what other processes have settled: of these, or of all that is waited for and not known here."""
        if request_ids is None:
            wanted = [request_id for request_id in self._waiters if request_id not in self._open]
        else:
            wanted = [
                request_id
                for request_id in request_ids
                if request_id in self._waiters or request_id in self._open
            ]
        for start in range(0, len(wanted), _READ_AT_A_TIME):
            for settled in await self._store.futures.settled_of(wanted[start : start + _READ_AT_A_TIME]):
                self.settled(settled)

    def lost(self, engine: str) -> None:
        """Another process has an engine: what becomes of its calls is found in the database from now on."""
        self._open = {key: future for key, future in self._open.items() if future.engine != engine}

    def answer_waiters(self) -> None:
        """The process is about to end: nobody waits any longer."""
        self._closing = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.cancel()

    def opened(self, future: Future) -> None:
        """An open future from before this process started, or that has moved to another engine, is known here from now
        on if that engine is here; of another one, the database tells."""
        if not self._held(future.engine):
            self._open.pop(future.request_id, None)
        elif self._recent.get(future.request_id) is None:
            self._open[future.request_id] = future

    def _accepted(self, future: Future, body: bytes | None) -> None:
        if future.open and self._held(future.engine):
            self._open[future.request_id] = future
        self._on_accepted(future, body)

    async def _wait(
        self, request_id: str, owner: str, hold_s: float, gone: Callable[[], Awaitable[bool]]
    ) -> Settled | None:
        """Wait for a wake-up; look into the database first when this process does not know the future."""
        deadline = asyncio.get_running_loop().time() + hold_s
        with self._waiting_for(request_id) as waiter:
            known = self._open.get(request_id)
            if known is not None and known.owner != owner:
                raise _unknown(request_id)
            if known is None and (settled := await self._look_up(request_id, owner)) is not None:
                return settled
            while not waiter.done():
                left = deadline - asyncio.get_running_loop().time()
                if self._closing:
                    return None
                if left <= 0:
                    return await self._last_look(request_id, owner)
                await asyncio.wait({waiter}, timeout=min(left, _ATTENTIVE_S))
                if not waiter.done() and await gone():
                    return None
            return None if waiter.cancelled() else waiter.result()

    @contextlib.contextmanager
    def _waiting_for(self, request_id: str) -> Iterator[asyncio.Future[Settled]]:
        waiter: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(request_id, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(request_id) is waiters:
                del self._waiters[request_id]

    async def _last_look(self, request_id: str, owner: str) -> Settled | None:
        """Nobody has woken us. If the answer of a commit was lost, the outcome is in the database all the same."""
        settled = await self._look_up(request_id, owner)
        if settled is not None:
            self._open.pop(request_id, None)
        return settled

    async def _look_up(self, request_id: str, owner: str) -> Settled | None:
        future = await self._store.futures.get(request_id)
        if future is None or future.owner != owner:
            raise await self._missing(request_id, owner)
        if future.open:
            return None
        result = await self._store.futures.result(request_id)
        if result is None and future.status is FutureStatus.DONE:
            raise Gone(f"the result of {request_id} is not kept any more", param="request_id")
        return Settled(future, result)

    async def _missing(self, request_id: str, owner: str) -> TandemError:
        """Of what belonged to an old enough session of the caller's, nobody knows any more whether it was there."""
        session = await self._store.sessions.get(session_of_id(request_id.rpartition(":")[0]))
        if session is None or session.owner != owner or time.time() - session.created_at < self._kept_s:
            return _unknown(request_id)
        return Gone(f"there is no future {request_id!r}, or it is not kept any more", param="request_id")


class RecentlySettled:
    """The newest outcomes, as many as fit; almost every result is fetched right after it was made."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._size = 0
        self._settled: OrderedDict[str, Settled] = OrderedDict()

    def get(self, request_id: str) -> Settled | None:
        return self._settled.get(request_id)

    def add(self, settled: Settled) -> None:
        previous = self._settled.pop(settled.future.request_id, None)
        self._size += _weight(settled) - (_weight(previous) if previous is not None else 0)
        self._settled[settled.future.request_id] = settled
        while self._size > self._capacity and self._settled:
            _, oldest = self._settled.popitem(last=False)
            self._size -= _weight(oldest)


_RECORD_BYTES = 2000
"""What a record weighs beside its result, roughly."""


def _weight(settled: Settled) -> int:
    return _RECORD_BYTES + len(settled.result or b"")


def require_same(first: Future, kind: str, digest: bytes | None) -> None:
    """Whether a call is the first one of its number sent again, as far as is known. Raises NumberTaken."""
    if None in (first.digest, digest) or first.digest == digest:
        return
    if first.kind == "create_run":
        field, place = "model_seq_id", f"run {first.run_id}"
    elif first.request_id == f"{first.run_id or first.sampler_id}:{first.seq_id}":
        field, place = "seq_id", f"number {first.seq_id} of {first.run_id or first.sampler_id}"
    else:
        field, place = "X-Idempotency-Key", f"a call of {first.run_id or first.sampler_id}"
    raise NumberTaken(
        f"{field} is that of another call: {place} is a {first.kind}, and this {kind} is not the same sent again; "
        f"give another {field}",
        param=field,
    )


def _unknown(request_id: str) -> NotFound:
    return NotFound(f"there is no future {request_id!r}", param="request_id")
