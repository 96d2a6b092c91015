"""While there are no keys, programs on this machine are served, directly, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from gateway.app import create_app
from gateway.engine_settings import EngineSettings
from gateway.settings import Settings
from gateway.store.keys import KeyStore
from gateway.store.records import ApiKey
from gateway.supervisor import EngineState
from tests.admin.conftest import keys_command
from tests.served import ServedGateway

LOCAL = "127.0.0.1"
ROUTES = ("/admin/v1/runs", "/api/v1/get_server_capabilities", "/v1/models")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FastAPI]:
    """A gateway in this process, so that a request may seem to come from anywhere."""
    engines = (EngineSettings(name="fake", plugin="fake", base_model="fake/model"),)
    data = tmp_path_factory.mktemp("strangers")
    app = create_app(Settings(data_dir=data, engines=engines, sqlite_synchronous="NORMAL"))
    async with app.router.lifespan_context(app):
        yield app


async def get(
    app: FastAPI, route: str, peer: str = LOCAL, host: str = "localhost:8000", **headers: str
) -> httpx.Response:
    """A request from an address, to a host name, with further headers."""
    transport = httpx.ASGITransport(app, client=(peer, 50123))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.get(route, headers={"host": host, **named})


@pytest.mark.asyncio(loop_scope="module")
async def test_readiness_waits_for_the_engines(app: FastAPI) -> None:
    seen = []
    for _ in range(600):
        answer = await get(app, "/readyz")
        seen.append((answer.status_code, answer.json()["ready"]))
        if answer.status_code == 200:
            break
        await asyncio.sleep(0.02)
    assert set(seen) == {(503, False), (200, True)}


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_wrong_with_an_engine_is_no_business_of_strangers(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    [dispatcher] = app.state.gateway.fleet.dispatchers.values()
    monkeypatch.setattr(dispatcher.supervisor, "state", EngineState.DOWN)
    monkeypatch.setattr(dispatcher.supervisor, "problem", "/srv/models is empty")
    reads = 0
    all_keys = KeyStore.all

    async def counted(self: KeyStore) -> list[ApiKey]:
        nonlocal reads
        reads += 1
        return await all_keys(self)

    monkeypatch.setattr(KeyStore, "all", counted)
    [told] = (await get(app, "/readyz")).json()["engines"].values()
    assert told == "down: /srv/models is empty"
    for _ in range(50):
        answer = await get(app, "/readyz", "203.0.113.9")
        assert answer.status_code == 503
        assert list(answer.json()["engines"].values()) == ["down"]
    assert reads <= 6  # once a second, and the keys every other second


@pytest.mark.asyncio(loop_scope="module")
async def test_programs_on_this_machine_are_served(app: FastAPI) -> None:
    for route in ROUTES:
        for peer, host in ((LOCAL, "localhost:8000"), ("::1", "[::1]:8000"), ("127.8.9.1", "127.0.0.1")):
            answer = await get(app, route, peer, host)
            assert answer.status_code == 200, answer.text
        own_page = await get(app, route, origin="http://localhost:8000")
        assert own_page.status_code == 200


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("peer", "host", "headers", "named"),
    [
        ("203.0.113.9", "localhost:8000", {}, "203.0.113.9"),
        ("::ffff:203.0.113.9", "localhost:8000", {}, "203.0.113.9"),
        ("2001:db8::1", "localhost:8000", {}, "2001:db8::1"),
        (LOCAL, "localhost:8000", {"x_forwarded_for": "127.0.0.1"}, "x-forwarded-for"),
        (LOCAL, "localhost:8000", {"forwarded": "for=127.0.0.1"}, "forwarded"),
        (LOCAL, "localhost:8000", {"x_real_ip": "127.0.0.1"}, "x-real-ip"),
        (LOCAL, "localhost:8000", {"x_forwarded_host": "localhost"}, "x-forwarded-host"),
        (LOCAL, "evil.example", {}, "evil.example"),
        (LOCAL, "localhost.evil.example:8000", {}, "localhost.evil.example"),
        (LOCAL, "localhost:8000", {"origin": "https://evil.example"}, "evil.example"),
        (LOCAL, "localhost:8000", {"origin": "null"}, "null"),
        (LOCAL, "localhost:8000", {"origin": "http://localhost.evil.example"}, "localhost.evil.example"),
        (LOCAL, "localhost:8000", {"origin": "http://localhost@evil.example"}, "evil.example"),
    ],
)
async def test_others_are_refused_with_the_reason(
    app: FastAPI, peer: str, host: str, headers: dict[str, str], named: str
) -> None:
    for route in ROUTES:
        refused = await get(app, route, peer, host, **headers)
        assert refused.status_code == 403, refused.text
        assert "no API keys are configured" in refused.text
        assert "python -m gateway.keys add" in refused.text
        assert named in refused.text


def test_a_proxys_header_is_noticed_behind_the_real_server(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path)
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, trust_env=False) as http:
            assert http.get(ROUTES[0]).status_code == 200
            for value in ("127.0.0.1", "203.0.113.9"):
                assert http.get(ROUTES[0], headers={"X-Forwarded-For": value}).status_code == 403
            assert http.get(ROUTES[0], headers={"Host": "evil.example"}).status_code == 403
    finally:
        gateway.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_key_opens_the_door_and_closes_it_for_those_without(app: FastAPI) -> None:
    """The last one: from here on a key is needed."""
    settings = {"data_dir": str(app.state.gateway.settings.data_dir)}
    key = (await asyncio.to_thread(keys_command, settings, "add", "alice")).split()[0]
    app.state.keys._due_at = float("-inf")  # as some seconds later
    served = await get(
        app, ROUTES[0], "203.0.113.9", "gateway.example", x_api_key=key, x_forwarded_for="8.8.8.8"
    )
    assert served.status_code == 200
    assert (await get(app, ROUTES[0])).status_code == 401
