"""A firewall or a proxy that ends connections to the database costs clients a pause, and no engine its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.postgres import PostgresServer
from tests.served import ServedGateway

pytestmark = pytest.mark.postgres
CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
SLOW = {"name": "fake", "plugin": "fake", "base_model": "fake/model", "options": {"delay_s": 0.01}}
STEPS = 25


@pytest.fixture
def place(
    pg_server: PostgresServer, _pg_template: str, tmp_path: Path
) -> Iterator[tuple[ServedGateway, str]]:
    url = pg_server.url(pg_server.create_database(template=_pg_template))
    gateway = ServedGateway(tmp_path, [SLOW], database_url=url)
    gateway.start()
    yield gateway, url
    gateway.close()


def again(send: Callable[[], httpx.Response]) -> str:
    """As the SDK does, while it is 503; the promise."""
    deadline = time.monotonic() + 60
    while (answer := send()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def trained(http: httpx.Client, between: Callable[[], None]) -> list[float]:
    """The losses of a run whose operations wait in a queue while `between` happens now and then."""
    run = begin_run(http)
    promises = []
    for step in range(STEPS):
        promises.append(again(lambda: send_pass(http, run, 2 * step + 1, [step, 2, 3, 4])))  # noqa: B023
        again(lambda: send_step(http, run, 2 * step + 2))  # noqa: B023
        if step % 5 == 4:
            between()
    return [outcome(http, promise)["metrics"]["loss:sum"] for promise in promises]


def test_no_engine_is_rebuilt(place: tuple[ServedGateway, str]) -> None:
    gateway, url = place
    with (
        httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http,
        psycopg.connect(url.replace("+asyncpg", ""), autocommit=True) as server,
    ):
        expected = trained(http, lambda: None)

        def cut() -> None:
            server.execute(CUT.encode())

        assert trained(http, cut) == expected
        [(attempts, epochs)] = server.execute(
            b"SELECT max(attempts), count(DISTINCT epoch) FROM futures"
        ).fetchall()
    assert (attempts, epochs) == (1, 1)
    log = gateway.log.read_text()
    assert "starting over" not in log
    assert "is restored in engine" not in log
