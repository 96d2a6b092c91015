"""Errors of the database that nobody foresaw: what runs in the background goes on, and the log says why it stumbled."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request

from gateway.app import running_gateway
from gateway.auth import Keys, hash_key
from gateway.engine_settings import EngineSettings
from gateway.errors import StoreUnavailable
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.keys import KeyStore
from gateway.store.leases import LeaseRequest, LeaseStore
from gateway.store.records import ApiKey
from gateway.tokens import Tokens

FAKE = EngineSettings(name="fake", plugin="fake", base_model="fake/model")


async def test_a_lease_that_could_not_be_renewed_does_not_end_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    renew = LeaseStore.renew
    calls = 0

    async def stumbling(self: LeaseStore, request: LeaseRequest) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise DBAPIError("UPDATE", None, Exception("something new"))
        return await renew(self, request)

    monkeypatch.setattr(LeaseStore, "renew", stumbling)
    async with running_gateway(Settings(data_dir=tmp_path, engines=(FAKE,), lease_s=0.9)) as gateway:
        supervisor = gateway.fleet.dispatchers["fake"].supervisor
        process = await supervisor.ready()
        with caplog.at_level(logging.WARNING, "gateway"):
            for _ in range(100):
                await asyncio.sleep(0.1)
                if calls >= 3:
                    break
        assert calls >= 3
        assert await supervisor.ready() is process
        assert supervisor.starts == 1
    assert "the lease could not be renewed" in caplog.text
    assert "something new" in caplog.text


class _Fickle(KeyStore):
    """Keys of a database that answers at first."""

    def __init__(self) -> None:
        self.reads = 0
        self.answers = True

    async def all(self) -> list[ApiKey]:
        self.reads += 1
        if not self.answers:
            raise StoreUnavailable("down")
        return [ApiKey(hash_key("tml-a"), "alice", False, "", 0.0)]


async def test_known_keys_open_the_door_during_an_outage_and_few_requests_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.auth._REFRESH_S", 0.2)
    store = Store.__new__(Store)
    store.keys = fickle = _Fickle()
    keys = Keys(store, (), Tokens(b"s" * 32, 3600))
    request = Request({"type": "http", "headers": [(b"x-api-key", b"tml-a")]})
    assert (await keys.caller(request)).owner == "alice"
    fickle.answers = False
    await asyncio.sleep(0.25)
    for _ in range(50):
        assert (await keys.caller(request)).owner == "alice"
    assert fickle.reads == 2
    monkeypatch.setattr("gateway.auth._STALE_S", 0.0)
    await asyncio.sleep(0.25)
    with pytest.raises(StoreUnavailable):
        await keys.caller(request)
