"""HEAD is GET without the body; what no route takes is refused, and nothing is told to web pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.conftest import KEY
from tests.served import ServedGateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    gateway = ServedGateway(tmp_path_factory.mktemp("methods"))
    gateway.start()
    yield gateway
    gateway.close()


@pytest.fixture
def client(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=30) as client:
        yield client


def test_head_is_answered_on_every_route_of_get(client: httpx.Client) -> None:
    paths = [
        path for path, methods in client.get("/openapi.json").json()["paths"].items() if "get" in methods
    ]
    assert {"/healthz", "/readyz", "/v1/models"} <= set(paths)
    for path in [*paths, "/", "/docs", "/openapi.json"]:
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code, path
        assert head.content == b""
        for name in ("content-type", "location"):
            assert head.headers.get(name) == got.headers.get(name), path
        assert client.get("/healthz").json() == {"status": "ok"}  # on the same connection


def test_a_route_without_get_has_no_head(client: httpx.Client) -> None:
    for path in ("/api/v1/optim_step", "/v1/chat/completions", "/nowhere"):
        head = client.head(path)
        assert head.status_code == client.get(path).status_code
        assert head.status_code in (404, 405)


def test_no_preflight_is_answered(client: httpx.Client) -> None:
    asked = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/api/v1/optim_step", "/healthz"):
        answer = client.options(path, headers=asked)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
