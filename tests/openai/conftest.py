"""The dialect's routes over a scripted backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI, Request

from gateway.auth import owner_of, presented_key
from gateway.bodies import Bodies
from gateway.errors import Unauthorized
from gateway.openai import router
from tests.openai.doubles import ScriptedBackend

KEY = "tml-test"


async def _owner(request: Request) -> str:
    if presented_key(request) != KEY:
        raise Unauthorized("this API key is not known here")
    return "ada"


def application(backend: ScriptedBackend) -> FastAPI:
    """The routes under both prefixes, for one known key."""
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/oai/api/v1")
    app.state.backend = backend
    app.state.bodies = Bodies(64 << 20, 256 << 20)
    app.dependency_overrides[owner_of] = _owner
    return app


Connect = Callable[[ScriptedBackend], httpx.AsyncClient]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """A client of the routes over a given backend."""
    clients: list[httpx.AsyncClient] = []

    def connected(backend: ScriptedBackend) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(application(backend)),
            base_url="http://gateway",
            headers={"authorization": f"Bearer {KEY}"},
        )
        clients.append(client)
        return client

    yield connected
    for client in clients:
        await client.aclose()
