"""The official SDK with its waits shortened: how often it tries, and what it takes for an error that passes, stays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import tinker._base_client
from tinker.lib import api_future_impl, internal_client_holder, retry_handler, session_futures_poller

_MODULES = (api_future_impl, internal_client_holder, retry_handler, session_futures_poller)
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 10.0


class _Hurried(ModuleType):
    """asyncio, with shorter sleeps."""

    def __init__(self, times: float) -> None:
        super().__init__("asyncio")
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        """A sleep that is so many times shorter."""
        await asyncio.sleep(seconds / self._times)


@contextlib.contextmanager
def hurried(times: float) -> Iterator[None]:
    """Until the block ends, the SDK in this process waits so many times shorter before it tries again."""
    with contextlib.ExitStack() as patches:
        for module in _MODULES:
            patches.enter_context(mock.patch.object(module, "asyncio", _Hurried(times)))
        base = tinker._base_client
        patches.enter_context(mock.patch.object(base, "INITIAL_RETRY_DELAY", _FIRST_RETRY_S / times))
        patches.enter_context(mock.patch.object(base, "MAX_RETRY_DELAY", _LONGEST_RETRY_S / times))
        yield
