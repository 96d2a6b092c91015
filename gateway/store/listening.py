"""Hearing what other gateways tell: a connection of its own that listens, made anew whenever it is cut."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from gateway.store.notices import CHANNEL, News, decoded
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

_AGAIN_S = 0.5
_PING_EVERY_S = 5.0
_PING_WITHIN_S = 5.0


class Listener:
    """Calls `heard` with all news, and `connected` whenever it begins to listen: what was told before was not heard."""

    def __init__(self, url: str, heard: Callable[[News], None], connected: Callable[[], None]) -> None:
        self._engine = create_async_engine(url, poolclass=NullPool, connect_args={"timeout": 15})
        self._heard = heard
        self._connected = connected
        self._trouble = Trouble(log, "notices of other gateways are heard again")

    async def listen_forever(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._listen()
            except Exception as error:  # boundary: the next connection is tried; others look meanwhile
                self._trouble.failed(f"notices of other gateways cannot be heard: {error}")
            await asyncio.sleep(_AGAIN_S)

    async def _listen(self) -> None:
        """As long as the connection lives. It is asked now and then: one that is cut in silence tells nobody."""
        cut = asyncio.Event()
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.add_termination_listener(lambda *_: cut.set())
            await driver.add_listener(CHANNEL, lambda *said: self._heard(decoded(said[3])))
            self._trouble.succeeded(surely=True)
            self._connected()
            while not cut.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(
                        _PING_EVERY_S
                    ):  # wait_for loses cancellations before Python 3.12
                        await cut.wait()
                    break
                await driver.execute("SELECT 1", timeout=_PING_WITHIN_S)
            await connection.invalidate()
