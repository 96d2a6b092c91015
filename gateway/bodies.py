"""Bodies of requests: read within a limit each, and within a budget all together.

What a body holds counts from before it is read until its request has been answered. Bodies as they are sent and what
they decompress to have budgets of their own, taken in this order, so that no two requests wait for each other. Small
bodies are not counted: a connection holds one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import NoRoom, PayloadTooLarge

SMALL = 64 * 1024
"""Bytes up to which a body is not counted."""
BEGINNING = 1024
"""Bytes of a body that are enough to find out whose operation it was to be."""
_ADVICE = " (setting max_body_bytes); send it in smaller parts"
_DRAINED = 4
_HELD = "tandem.bodies"
_MOST_WAITING = 1024
_LONGEST_WAIT_S = 20.0
_PATIENCE_S = 30.0
"""Seconds for which a sender may be silent."""
_SLOWEST = 64 * 1024
"""Bytes in a second: whoever sends more slowly for long does not keep others waiting."""


class BodyTooLarge(PayloadTooLarge):
    """Over the limit. `beginning` is what came first of it, for finding out whose operation this was to be."""

    def __init__(self, limit: int, beginning: bytes, advice: str) -> None:
        super().__init__(f"the body is larger than {limit} bytes{advice}")
        self.beginning = beginning


class Room:
    """A number of bytes that requests take and give back. Who waits is served in the order of asking, senders in
    turn, so that one with many large bodies does not hold up the others."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        self._waiting: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self._waiters = 0

    async def take(self, size: int, sender: str) -> None:
        """Returns when `size` bytes are taken. Raises NoRoom when too many wait, or it takes too long."""
        size = min(size, self.capacity)
        if not self._waiters and self.taken + size <= self.capacity:
            self.taken += size
            return
        if self._waiters >= _MOST_WAITING:
            raise NoRoom(f"{self._waiters} requests wait already for memory for their bodies; try again")
        waiter = _Waiter(size)
        self._waiting.setdefault(sender, deque()).append(waiter)
        self._waiters += 1
        try:
            await asyncio.wait({waiter.granted}, timeout=_LONGEST_WAIT_S)
        except asyncio.CancelledError:
            self._withdraw(sender, waiter)
            raise
        if not waiter.granted.done():
            self._withdraw(sender, waiter)
            raise NoRoom("there was no memory for this body in time; try again")

    def give(self, size: int) -> None:
        """Give bytes back."""
        self.taken -= min(size, self.capacity)
        self._grant()

    def _withdraw(self, sender: str, waiter: _Waiter) -> None:
        if waiter.granted.done():
            self.give(waiter.size)
            return
        self._waiting[sender].remove(waiter)
        self._left(sender)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            sender, waiters = next(iter(self._waiting.items()))
            if self.taken + waiters[0].size > self.capacity:
                return
            waiter = waiters.popleft()
            self._left(sender)
            if sender in self._waiting:
                self._waiting.move_to_end(sender)
            self.taken += waiter.size
            waiter.granted.set_result(None)

    def _left(self, sender: str) -> None:
        self._waiters -= 1
        if not self._waiting[sender]:
            del self._waiting[sender]


@dataclass(eq=False, slots=True)
class _Waiter:
    size: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Bodies:
    """The limit for a body as it is sent, and the budgets of all."""

    def __init__(self, largest: int, budget: int) -> None:
        self.largest = largest
        self.sent = Room(budget)
        self.plain = Room(budget)


def bodies_of(request: Request) -> Bodies:
    """The budgets of this application."""
    return cast(Bodies, request.app.state.bodies)


class ReleasedBodies:
    """Gives back what a request has taken when it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            for room, size in scope.pop(_HELD, ()):
                room.give(size)


async def hold(request: Request, room: Room, size: int) -> None:
    """Take bytes for a request, until it is answered."""
    if size <= SMALL:
        return
    await room.take(size, _sender(request))
    request.scope.setdefault(_HELD, []).append((room, size))


def let_go(request: Request, room: Room) -> None:
    """Give back early what a request has taken of a budget."""
    held = request.scope.get(_HELD, [])
    for entry in [entry for entry in held if entry[0] is room]:
        held.remove(entry)
        room.give(entry[1])


def _sender(request: Request) -> str:
    """Requests with one key are one sender's."""
    key = request.headers.get("x-api-key") or request.headers.get("authorization") or ""
    return hashlib.sha256(key.encode()).hexdigest()


async def read_sent(request: Request, limit: int, advice: str = _ADVICE) -> bytes:
    """The body as it was sent, at most `limit` bytes. Raises BodyTooLarge, which ends with the advice, and NoRoom."""
    expected = _declared(request, limit)
    await hold(request, bodies_of(request).sent, expected)
    counted = expected > SMALL
    sent = io.BytesIO()  # one buffer: parts that are joined at the end would be there twice
    beginning = b""
    size = 0
    async with patience(limit) as heard:
        async for chunk in request.stream():
            heard()
            size += len(chunk)
            if size > limit:
                beginning = beginning or (sent.getvalue() or chunk)[:BEGINNING]
                sent = io.BytesIO()
                if (
                    size > _DRAINED * limit
                ):  # most clients read the answer only after they have sent everything
                    break
                continue
            if size > SMALL and not counted:
                counted = True
                await hold(request, bodies_of(request).sent, limit)
            sent.write(chunk)
    if size > limit:
        raise BodyTooLarge(limit, beginning, advice)
    return sent.getvalue()


@contextlib.asynccontextmanager
async def patience(limit: int) -> AsyncIterator[Callable[[], None]]:
    """A body of at most `limit` bytes that does not come keeps neither its memory nor its place. What is yielded is
    called whenever a part has come. Raises NoRoom."""
    now = asyncio.get_running_loop().time
    end = now() + _PATIENCE_S + limit / _SLOWEST
    try:
        async with asyncio.timeout(_PATIENCE_S) as silence:
            yield lambda: silence.reschedule(min(end, now() + _PATIENCE_S))
    except TimeoutError as error:
        raise NoRoom("the body came too slowly; send it again") from error


def _declared(request: Request, limit: int) -> int:
    """Content-Length, as far as it may be; 0 when the body's size is not known before it has come."""
    declared = request.headers.get("content-length", "")
    return min(int(declared), limit) if declared.isdecimal() else 0
