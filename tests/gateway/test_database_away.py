"""A Postgres that is not there when a gateway starts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, text

from gateway.errors import StoreUnavailable
from gateway.store.database import Database
from tests.postgres import PostgresServer
from tests.served import ServedGateway

pytestmark = pytest.mark.postgres


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of this test's own, to be stopped and started."""
    own = PostgresServer()
    yield own
    own.close()


@pytest.fixture
def url(server: PostgresServer, tmp_path: Path) -> str:
    """A database with the schema."""
    url = server.url(server.create_database())
    ServedGateway(tmp_path, None, database_url=url).migrate()
    return url


def test_a_gateway_that_starts_waits_for_it(server: PostgresServer, url: str, tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path, None, database_url=url)
    server.stop(signal.SIGINT)
    try:
        gateway.launch()
        deadline = time.monotonic() + 30
        while "waiting for the database" not in gateway.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        server.start_again()
        gateway.wait_until_ready()
        assert httpx.get(f"{gateway.url}/readyz", timeout=10).status_code == 200
    finally:
        gateway.close()


def test_one_that_stays_away_ends_the_start_with_a_sentence(
    server: PostgresServer, url: str, tmp_path: Path
) -> None:
    gateway = ServedGateway(tmp_path, None, database_url=url, database_wait_s="0.5")
    server.stop(signal.SIGINT)
    try:
        gateway.launch()
        deadline = time.monotonic() + 30
        while gateway.running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not gateway.running
        assert "the database cannot serve this now" in gateway.log.read_text()
        assert "Traceback" not in gateway.log.read_text()
    finally:
        gateway.close()
        server.start_again()


@pytest.mark.slow
def test_one_that_is_away_for_a_while_is_told_in_few_lines(
    server: PostgresServer, url: str, tmp_path: Path
) -> None:
    """Whatever asks it every moment: clients, leases, engines, duties."""
    gateway = ServedGateway(tmp_path, None, database_url=url, duty_s="1")
    gateway.start()
    try:
        before = len(gateway.log.read_text().splitlines())
        server.stop(signal.SIGINT)
        until = time.monotonic() + 7
        while time.monotonic() < until:
            assert httpx.get(f"{gateway.url}/api/v1/sessions", timeout=60).status_code == 503
            time.sleep(0.05)
        away = gateway.log.read_text().splitlines()[before:]
        assert [line for line in away if "the database cannot do what it was asked" in line]
        assert len(away) <= 15, away
        server.start_again()
        gateway.wait_until_ready()
        deadline = time.monotonic() + 30
        while "the database stores again what it is given" not in gateway.log.read_text():
            assert time.monotonic() < deadline, gateway.log.read_text()
            time.sleep(0.1)
    finally:
        gateway.close()


# What SQLAlchemy could not close, for it was cut, is left to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_every_write_while_it_is_away_is_refused_as_an_outage(server: PostgresServer, url: str) -> None:
    """The first finds its connection cut; the next ones find nobody to connect to."""
    database = Database(url)
    database.start()
    await database.write(_asks, None)
    server.stop(signal.SIGINT)
    try:
        await asyncio.sleep(1.1)  # a connection that was idle so long is asked first whether it is there
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await database.write(_asks, None)
    finally:
        server.start_again()
    await database.write(_asks, None)
    await database.close()


def _asks(connection: Connection, wanted: list[None]) -> list[None]:
    connection.execute(text("SELECT 1"))
    return wanted
