"""A gateway with the numpy engine, and the official SDK with its waits shortened."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import tinker._base_client
from tinker.lib import api_future_impl, internal_client_holder, retry_handler

from tests.served import ServedGateway

HASTE = 25.0
"""How many times shorter the SDK waits before it tries again. How often it tries, and what it takes for an error that
passes, stays as it is."""


class Hurried(ModuleType):
    """asyncio, with shorter sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / HASTE)


@pytest.fixture
def hurried_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official SDK, whose retries would take minutes."""
    for module in (api_future_impl, internal_client_holder, retry_handler):
        monkeypatch.setattr(module, "asyncio", Hurried("asyncio"))
    monkeypatch.setattr(tinker._base_client, "INITIAL_RETRY_DELAY", 0.5 / HASTE)
    monkeypatch.setattr(tinker._base_client, "MAX_RETRY_DELAY", 10.0 / HASTE)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("chaos"))
    served.start()
    yield served
    served.close()
