"""Company: which other gateways share the database, and what they tell this one and are told by it.

While there are others, each transaction that concerns them tells them so (`gateway.store.notices`), and every few
seconds everybody looks for what no notice has told. With the embedded database there are no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from gateway.completions import Completions
from gateway.dispatch import Dispatcher
from gateway.errors import StoreUnavailable
from gateway.fleet import Fleet
from gateway.futures import Futures
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.gateways import SignOfLife
from gateway.store.listening import Listener
from gateway.store.notices import News, payload_of
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 3.0
_OVERLAP_S = 120.0
"""How far back a look for what others have accepted reaches: their clocks may be behind."""


class Notices:
    """This process among the gateways of its database."""

    def __init__(
        self, settings: Settings, store: Store, fleet: Fleet, futures: Futures, completions: Completions
    ) -> None:
        self._settings = settings
        self._store = store
        self._fleet = fleet
        self._futures = futures
        self._completions = completions
        self._others: frozenset[str] = frozenset()
        self._due = asyncio.Event()
        self._looked_at: dict[str, float] = {}
        self._look_due = asyncio.Event()
        self._trouble = Trouble(log, "what other gateways do is known again")
        self._tasks: set[asyncio.Task[None]] = set()

    def others_known(self) -> bool:
        """Whether there are other gateways, as far as is known."""
        return bool(self._others)

    async def start(self) -> None:
        """Say that this process is there, and begin to listen; call it in the running loop."""
        if self._settings.embedded:
            return
        await self._report()
        await self._tell_of_change()
        listener = Listener(self._settings.url, self._heard, self._connected)
        self._spawn(listener.listen_forever())
        self._spawn(self._forever(self._due, self._settings.lease_s / 3, self._report))
        self._spawn(self._forever(self._look_due, _LOOK_EVERY_S, self._look))

    async def stop(self) -> None:
        """Listen no longer, and tell others so."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._settings.embedded:
            with contextlib.suppress(StoreUnavailable):
                await self._store.gateways.leave(self._fleet.holder)
                await self._tell_of_change()

    # ------------------------------------------------------------------ who is there

    async def _report(self) -> None:
        """Who has not given three signs of life in a row is not waited for any longer."""
        sign = SignOfLife(self._fleet.holder, self._settings.internal_url, self._settings.lease_s)
        others = await self._store.gateways.report(sign)
        if others != self._others:
            log.info("gateways that share the database, besides this one: %d", len(others))
            self._look_due.set()  # for the last time, perhaps
        self._others = others
        self._store.database.payload_of = (
            functools.partial(payload_of, self._fleet.holder) if others else None
        )

    async def _tell_of_change(self) -> None:
        await self._store.database.tell_all(News(self._fleet.holder, joined=True))

    # ------------------------------------------------------------------ what is heard

    def _connected(self) -> None:
        """What was told while nobody listened is looked for."""
        self._look_due.set()
        self._due.set()

    def _heard(self, news: News) -> None:
        if news.sender == self._fleet.holder:
            return
        if news.sender not in self._others or news.joined:
            self._due.set()
        if news.look:
            self._look_due.set()
        for name, dispatcher in self._fleet.dispatchers.items():
            self._heard_of_engine(name, dispatcher, news)
        if news.settled:
            self._settled_elsewhere(news.settled)

    def _heard_of_engine(self, name: str, dispatcher: Dispatcher, news: News) -> None:
        if name in news.free:
            dispatcher.supervisor.look()
        if not dispatcher.supervisor.holding:
            return
        for run_id in news.dropped.get(name, ()):
            dispatcher.training.drop(run_id)
        if name in news.accepted:
            self._spawn(self._adopt(dispatcher, news.accepted[name]))

    def _settled_elsewhere(self, request_ids: Sequence[str]) -> None:
        for dispatcher in self._fleet.dispatchers.values():
            dispatcher.sampling.withdraw(request_ids)
        if self._futures.awaits(request_ids):
            self._spawn(self._futures.look(request_ids))
        followed = [request_id for request_id in request_ids if self._completions.follows(request_id)]
        if followed:
            self._spawn(self._complete(followed))

    async def _complete(self, request_ids: Sequence[str]) -> None:
        for future in await self._store.futures.many(request_ids):
            if not future.open:
                self._completions.add(future)

    async def _adopt(self, dispatcher: Dispatcher, request_ids: Sequence[str]) -> None:
        """Hand what others have accepted to its engine, what is known already apart."""
        unknown = [request_id for request_id in request_ids if not self._futures.knows(request_id)]
        if not unknown:
            return
        for future in await self._store.futures.many(unknown):
            if future.open and not self._futures.knows(future.request_id):
                dispatcher.adopt(future)

    # ------------------------------------------------------------------ without notices

    async def _look(self) -> None:
        """Find out what no notice has told, for whoever waits here and for the engines that are here."""
        await self._futures.look()
        await self._completions.look()
        for name, dispatcher in self._fleet.dispatchers.items():
            if self._fleet.holds(name):
                begun = time.time()
                since = self._looked_at.get(name, begun) - _OVERLAP_S
                await self._adopt(dispatcher, await self._store.futures.open_ids(name, since))
                self._looked_at[name] = begun

    async def _forever(self, due: asyncio.Event, every_s: float, what: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):  # wait_for loses cancellations before Python 3.12
                    await due.wait()
            due.clear()
            try:
                await what()
                self._trouble.succeeded()
            except (
                Exception
            ) as error:  # boundary: the next time comes soon, and the log says why this one came to nothing
                self._trouble.failed(f"company of other gateways: {error}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _logged(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except StoreUnavailable as error:
            self._trouble.failed(f"what another gateway has told is looked at later: {error}")
