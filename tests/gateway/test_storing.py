"""A gateway whose database stores nothing is not ready, says why to who has a key, and is ready again by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.gateway.conftest import begin_run, outcome, send_pass
from tests.postgres import PostgresServer
from tests.served import ServedGateway

pytestmark = pytest.mark.postgres
CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


class ReadOnly:
    """A database whose disk has been made read-only, as far as its clients can tell."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")

    def set(self, read_only: bool) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(b"SET default_transaction_read_only = off")
            name = connection.info.dbname
            change = (
                f'ALTER DATABASE "{name}" SET default_transaction_read_only = {"on" if read_only else "off"}'
            )
            connection.execute(change.encode())
            connection.execute(CUT.encode())


@pytest.fixture
def url(pg_server: PostgresServer, _pg_template: str) -> str:
    return pg_server.url(pg_server.create_database(template=_pg_template))


@pytest.fixture
def gateway(url: str, tmp_path: Path) -> Iterator[ServedGateway]:
    gateway = ServedGateway(tmp_path, None, database_url=url, lease_s="60")
    gateway.start()
    yield gateway
    gateway.close()


def test_it_is_not_ready_and_comes_back(gateway: ServedGateway, url: str) -> None:
    key = gateway.add_key("alice")
    database = ReadOnly(url)
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": key}, timeout=60) as http:
        run = begin_run(http)
        database.set(True)
        deadline = time.monotonic() + 30
        while send_pass(http, run, 1, [1, 2, 3]).status_code == 200:  # by a connection from before
            assert time.monotonic() < deadline
        told, untold = http.get("/readyz"), httpx.get(f"{gateway.url}/readyz", timeout=30)
        assert (told.status_code, untold.status_code) == (503, 503)
        assert "read-only" in told.json()["problem"]
        assert untold.json()["problem"] == "the database does not store what it is given"
        assert http.get("/healthz").status_code == 200
        database.set(False)
        gateway.wait_until_ready(30)
        assert "problem" not in http.get("/readyz").json()
        deadline = time.monotonic() + 30
        while (sent := send_pass(http, run, 1, [1, 2, 3])).status_code == 503:
            assert time.monotonic() < deadline
        assert "metrics" in outcome(http, sent.json()["request_id"])
    assert gateway.log.read_text().count("read-only transaction") < 8
