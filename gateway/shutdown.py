"""The end of a gateway: Ctrl-C or SIGTERM, and the next process goes on where this one stopped.

While it drains it still answers and accepts, for what is accepted is durable; only readiness says no. The server under
it is told to end when nothing is at hand any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from gateway.fleet import Fleet

log = logging.getLogger(__name__)

_GRACE_S = 5.0
"""Seconds that the server waits for requests under way, an upload say, after everything else is done."""

Server = Callable[[int, FrameType | None], object]
"""The handler of signals of the server under this application."""


@contextmanager
def draining_on_signals(fleet: Fleet, answers: Sequence[Callable[[], None]]) -> Iterator[None]:
    """The first signal drains, answers every waiting client and ends the server; a second one ends the process at once.

    The server's own handlers, which were installed before, do what they do after that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loop = asyncio.get_running_loop()
    ends: list[asyncio.Task[None]] = []
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            log.warning("ends at once, asked twice")
            os._exit(128 + number)
        asked = True
        server = previous[
            signal.SIGINT
        ]  # after SIGTERM it would end itself by that signal, not with status 0
        if callable(server):
            loop.call_soon_threadsafe(lambda: ends.append(loop.create_task(_end(fleet, answers, server))))

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


async def _end(fleet: Fleet, answers: Sequence[Callable[[], None]], server: Server) -> None:
    log.info("shutting down: no operation is begun any more, those at hand are finished")
    await fleet.drain()
    for answer in answers:
        answer()
    server(signal.SIGINT, None)
    # A second one has it wait no longer. What it would do after that is done.
    asyncio.get_running_loop().call_later(_GRACE_S, server, signal.SIGINT, None)
