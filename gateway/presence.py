"""Whether whoever asked is still there: work for a client that has hung up ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. It is cancelled when the client hangs up; then ClientDisconnect is raised.

    The request's body must have been read: what comes behind it from `receive` is that the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hangs_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hangs_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
