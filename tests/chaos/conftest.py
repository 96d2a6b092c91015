"""A gateway with the numpy engine, and the official SDK with its waits shortened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.haste import hurried
from tests.served import ServedGateway

HASTE = 25.0
"""How many times shorter the SDK, whose retries would take minutes, waits before it tries again."""


@pytest.fixture
def hurried_sdk() -> Iterator[None]:
    """The official SDK in haste."""
    with hurried(HASTE):
        yield


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("chaos"))
    served.start()
    yield served
    served.close()
