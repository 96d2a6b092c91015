"""Tokens in place of keys: whose they are, how long they live, and what ends them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import tinker

from gateway.errors import InvalidToken
from gateway.migrate import upgrade
from gateway.store import Store
from gateway.store.database import Database
from gateway.tokens import Tokens
from tests.gateway.conftest import datum
from tests.gateway.test_keys import client_with, keys_command, make_key
from tests.served import ServedGateway

SECRET = b"s" * 32
REVOKED_WITHIN_S = 10.0
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def claims_of(token: str) -> dict[str, Any]:
    """What a token says, read as the SDK does: without looking at the signature."""
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


# ---------------------------------------------------------------------------- made and read


def test_a_token_stands_for_its_key_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(SECRET, 1000.0)
    before = int(time.time())
    token = tokens.issue("ann@example.org", "ab" * 32)
    claims = claims_of(token)
    assert claims["exp"] - claims["iat"] == 1000
    assert before <= claims["iat"] <= time.time()
    assert (claims["sub"], claims["email"]) == ("tml:user:ann@example.org", "ann@example.org")
    assert tokens.key_hash(token) == "ab" * 32
    monkeypatch.setattr(time, "time", lambda: claims["exp"] + 0.5)
    for reader in (tokens, Tokens(SECRET, 1000.0)):  # one that has seen it before, one that has not
        with pytest.raises(InvalidToken, match="expired"):
            reader.key_hash(token)


def test_the_signature_is_hmac_sha256_over_header_and_payload() -> None:
    token = Tokens(SECRET, 1000.0).issue("ann", None)
    signed, _, signature = token.rpartition(".")
    key = hmac.new(SECRET, b"tandem tokens", hashlib.sha256).digest()
    expected = base64.urlsafe_b64encode(hmac.new(key, signed.encode(), hashlib.sha256).digest()).rstrip(b"=")
    assert signature.encode() == expected
    assert "email" not in claims_of(token)


def test_what_others_made_is_no_token() -> None:
    tokens = Tokens(SECRET, 1000.0)
    good = tokens.issue("ann", "ab" * 32)
    header, payload, signature = good.split(".")
    forged = base64.urlsafe_b64encode(json.dumps({**claims_of(good), "key": "cd" * 32}).encode())
    claims = {**claims_of(good)}
    for bad in (
        Tokens(b"t" * 32, 1000.0).issue("ann", "ab" * 32),
        f"{header}.{forged.rstrip(b'=').decode()}.{signature}",
        jwt.encode(claims, "", algorithm="none"),
        f"{header}.{payload}.",
        "eyJ",
        "eyJ.eyJ.eyJ",
        "eyJ\u00e9",
    ):
        with pytest.raises(InvalidToken):
            tokens.key_hash(bad)


async def test_the_secret_is_drawn_once_for_all_gateways_of_a_database(
    tmp_path: Path, empty_pg_url: str
) -> None:
    for url in (f"sqlite:///{tmp_path / 'test.db'}", empty_pg_url):
        first = Database(url)
        await upgrade(first)
        databases = [first, Database(url)]
        stores = [Store(database) for database in databases]
        for store in stores:
            store.start()
        drawn = await asyncio.gather(*(store.secrets.get("signing") for store in stores for _ in range(3)))
        other = await stores[0].secrets.get("another")
        for store in stores:
            await store.close()
        assert len(set(drawn)) == 1
        assert len(drawn[0]) == 32
        assert other != drawn[0]


# ---------------------------------------------------------------------------- served


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    gateway = ServedGateway(tmp_path_factory.mktemp("tokens"))
    make_key_first = make_key(gateway, "root", "--admin")
    assert make_key_first
    gateway.start()
    yield gateway
    gateway.stop()
    gateway.close()


def token_of(gateway: ServedGateway, key: str) -> str:
    with client_with(gateway, key) as http:
        answer = http.post("/api/v1/auth/token", json={})
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["jwt"]
        return token


def test_a_token_opens_what_its_key_opens_and_nothing_else(locked: ServedGateway) -> None:
    ann, bob = make_key(locked, "ann"), make_key(locked, "bob")
    time.sleep(2.5)
    with client_with(locked, token_of(locked, ann)) as http:
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        assert http.get("/admin/v1/metrics").status_code == 403
    with client_with(locked, ann) as http:
        assert http.get(f"/api/v1/sessions/{session}").status_code == 200
    for key in (bob, token_of(locked, bob)):
        with client_with(locked, key) as http:
            assert http.get(f"/api/v1/sessions/{session}").status_code == 404
    bearer = {"Authorization": f"Bearer {token_of(locked, ann)}"}
    with client_with(locked, None, **bearer) as http:
        assert http.get("/v1/models").status_code == 200


def test_a_token_survives_a_restart_and_ends_with_its_key(locked: ServedGateway) -> None:
    key = make_key(locked, "carol")
    time.sleep(2.5)
    token = token_of(locked, key)
    locked.kill()
    locked.start()
    with client_with(locked, token) as http:
        assert http.get("/api/v1/sessions").status_code == 200
        listed = keys_command(locked, "list").stdout
        prefix = next(line.split()[0] for line in listed.splitlines() if "carol" in line)
        assert keys_command(locked, "remove", prefix).returncode == 0
        deadline = time.monotonic() + REVOKED_WITHIN_S
        while (answer := http.get("/api/v1/sessions")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert answer.json()["code"] == "invalid_token"


@pytest.mark.parametrize("path", ["/api/v1/sessions", "/v1/models", "/admin/v1/runs"])
def test_a_broken_token_is_told_apart_from_an_unknown_key(locked: ServedGateway, path: str) -> None:
    with client_with(locked, "eyJhbGciOiJub25lIn0.e30.") as http:
        answer = http.get(path)
        assert (answer.status_code, "invalid_token" in answer.text) == (401, True)
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    with client_with(locked, "tml-nobody") as http:
        answer = http.get(path)
        assert answer.status_code == 401
        assert "WWW-Authenticate" not in answer.headers


def test_the_official_sdk_knows_who_it_is(locked: ServedGateway) -> None:
    key = make_key(locked, "dora@example.org")
    time.sleep(2.5)
    me = tinker.RestClient(base_url=locked.url, api_key=key).whoami().result()
    assert me.email == "dora@example.org"
    assert me.user_urn == "tml:user:dora@example.org"
    assert me.org_urn == "tml:organization:tandem"


def test_the_official_sdk_trains_with_tokens_and_heals_a_rejected_one(locked: ServedGateway) -> None:
    """The token is broken behind the SDK's back, as a gateway with another database would find it."""
    key = make_key(locked, "emil")
    time.sleep(2.5)
    with tinker.ServiceClient(base_url=locked.url, api_key=key) as service:
        client = service.create_lora_training_client("fake/model", rank=4).result()
        provider: Any = service.holder._default_auth
        assert provider._token.startswith("eyJ")
        broken = provider._token[:-6] + "AAAAAA"
        provider._token = broken
        assert client.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
        assert provider._token not in (broken, key)


def test_without_keys_the_local_owner_gets_a_token_too(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "open")
    gateway.start()
    try:
        token = token_of(gateway, "tml-any")
        with client_with(gateway, token) as http:
            assert http.get("/api/v1/sessions").status_code == 200
            flags = http.post("/api/v1/client/config", json={"sdk_version": "0.38.0"}).json()
            assert flags["pjwt_auth_enabled"] is True
        me = tinker.RestClient(base_url=gateway.url, api_key="tml-any").whoami().result()
        assert me.user_urn == "tml:user:local"
        make_key(gateway, "ann")
        deadline = time.monotonic() + REVOKED_WITHIN_S
        with client_with(gateway, token) as http:
            while (answer := http.get("/api/v1/sessions")).status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    finally:
        gateway.stop()
        gateway.close()


def test_the_exchange_can_be_switched_off(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "plain", token_exchange="false")
    gateway.start()
    try:
        answer = httpx.post(
            f"{gateway.url}/api/v1/client/config", json={}, headers={"X-API-Key": "tml-any"}, trust_env=False
        )
        assert answer.json()["pjwt_auth_enabled"] is False
    finally:
        gateway.stop()
        gateway.close()
