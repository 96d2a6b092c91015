"""Two gateways on one PostgreSQL and one storage folder: the first has the engine, the second waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.postgres import PostgresServer
from tests.served import ServedGateway

KEY = "tml-test"
LEASE_S = 5.0
SETTINGS = {"lease_s": str(LEASE_S), "engine_owner_timeout_s": "3"}
pytestmark = pytest.mark.postgres


class Pair:
    """Gateways of one database. `holder` is started first, so it has the engine; `other` waits."""

    def __init__(
        self, root: Path, url: str, engines: list[dict[str, Any]] | None = None, **settings: str
    ) -> None:
        storage = root / "storage"
        storage.mkdir(parents=True)
        self.storage = storage
        self.url = url
        self.gateways = []
        for name in ("first", "second"):
            folder = root / name
            folder.mkdir()
            (folder / "storage").symlink_to(storage)
            gateway = ServedGateway(folder, engines, database_url=url, **{**SETTINGS, **settings})
            gateway.set("internal_url", gateway.url)
            self.gateways.append(gateway)
        self.holder, self.other = self.gateways

    def start(self) -> None:
        self.holder.start()
        self.other.start()
        wait_for_company(self.gateways)
        assert state(self.holder) == "ready"
        assert state(self.other) == "ready at another gateway"

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.close()


def state(gateway: ServedGateway) -> str:
    """What a gateway says of the first engine."""
    engines: dict[str, str] = httpx.get(f"{gateway.url}/readyz", timeout=10).json()["engines"]
    return next(iter(engines.values()))


def wait_for_company(gateways: list[ServedGateway]) -> None:
    """Until each has said that it knows of the other."""
    deadline = time.monotonic() + 30
    while not all("besides this one: 1" in gateway.log.read_text() for gateway in gateways):
        assert time.monotonic() < deadline, "the gateways do not find each other"
        time.sleep(0.05)


def database(server: PostgresServer, template: str) -> str:
    return server.url(server.create_database(template=template))


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    """What the database itself says."""
    with psycopg.connect(url.replace("+asyncpg", ""), autocommit=True) as connection:
        return connection.execute(statement.encode()).fetchall()


@pytest.fixture(scope="module")
def pair(
    pg_server: PostgresServer, _pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Running for all tests of a module."""
    pair = Pair(tmp_path_factory.mktemp("pair"), database(pg_server, _pg_template))
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


@pytest.fixture
def mortal_pair(pg_server: PostgresServer, _pg_template: str, tmp_path: Path) -> Iterator[Pair]:
    """Running for one test, which may end either."""
    pair = Pair(tmp_path, database(pg_server, _pg_template))
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


@pytest.fixture
def at_other(pair: Pair) -> Iterator[httpx.Client]:
    """Plain HTTP at the gateway without the engine."""
    with httpx.Client(base_url=pair.other.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


@pytest.fixture
def at_holder(pair: Pair) -> Iterator[httpx.Client]:
    """Plain HTTP at the gateway with the engine."""
    with httpx.Client(base_url=pair.holder.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client
