"""What waits of one owner is bounded in bytes, over a restart too, and frees itself; on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.postgres import PostgresServer
from tests.served import ServedGateway

LONG = list(range(200)) * 5


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServedGateway]:
    settings = {"max_queued_bytes": "50000", "gap_timeout_s": "600"}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    gateway = ServedGateway(tmp_path, None, **settings)
    gateway.start()
    yield gateway
    gateway.close()


def test_large_operations_fill_no_disk(narrow: ServedGateway) -> None:
    with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        run, other = begin_run(http), begin_run(http)
        accepted: list[str] = []
        while (answer := send_pass(http, run, 2 + len(accepted), LONG)).status_code == 200:
            accepted.append(answer.json()["request_id"])  # they wait for operation 1
            assert len(accepted) < 50
        assert len(accepted) > 1
        assert_full(answer)
        assert_full(send_step(http, other, 1))  # whatever the run

        narrow.kill()
        narrow.launch()
        narrow_again = httpx.HTTPTransport(retries=20)
        with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}, transport=narrow_again) as early:
            assert_full(send_step(early, other, 1))  # while the engine loads its model
        narrow.wait_until_ready()
        assert_full(send_step(http, other, 1))

        assert send_step(http, run, 1).status_code == 200  # for which the others wait
        assert all("metrics" in outcome(http, each) for each in accepted)
        assert "metrics" in outcome(http, send_step(http, other, 1).json()["request_id"])


def assert_full(answer: httpx.Response) -> None:
    assert answer.status_code == 429
    assert "max_queued_bytes" in answer.json()["detail"]
    assert answer.headers["retry-after"] == "1"
