"""Addresses that carry their own permission."""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi import Request

from gateway.errors import Forbidden
from gateway.signed_urls import SignedUrls

SECRET = b"s" * 32
PATH = "/api/v1/x/a:b c/ü"


def a_request(root_path: str = "") -> Request:
    scope = {
        "type": "http",
        "method": "GET",
        "scheme": "https",
        "server": ("gpu.example", 8443),
        "path": f"{root_path}/anything",
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"host", b"gpu.example:8443")],
    }
    return Request(scope)


def parts(url: str) -> tuple[int, str]:
    query = parse_qs(urlsplit(url).query)
    return int(query["expires"][0]), query["signature"][0]


def test_an_address_opens_its_path_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = SignedUrls(SECRET).sign(a_request(), PATH, 60.0)
    assert signed.url.startswith("https://gpu.example:8443/api/v1/x/a%3Ab%20c/%C3%BC?")
    expires, signature = parts(signed.url)
    assert 58 <= signed.expires_at - time.time() <= 60
    SignedUrls(SECRET).check(PATH, expires, signature)
    for path, moment, sign in (
        (PATH + "x", expires, signature),
        (PATH, expires + 1, signature),
        (PATH, expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        (PATH, expires, "ä"),
    ):
        with pytest.raises(Forbidden, match="not signed here"):
            SignedUrls(SECRET).check(path, moment, sign)
    with pytest.raises(Forbidden, match="not signed here"):
        SignedUrls(b"t" * 32).check(PATH, expires, signature)
    monkeypatch.setattr(time, "time", lambda: expires)
    with pytest.raises(Forbidden, match="expired"):
        SignedUrls(SECRET).check(PATH, expires, signature)


def test_the_signature_is_hmac_sha256_of_moment_and_path() -> None:
    expires, signature = parts(SignedUrls(SECRET).sign(a_request(), PATH, 60.0).url)
    key = hmac.new(SECRET, b"tandem signed url", hashlib.sha256).digest()
    assert signature == hmac.new(key, f"{expires}\n{PATH}".encode(), hashlib.sha256).hexdigest()


def test_what_clients_put_before_a_path_can_be_set() -> None:
    assert (
        SignedUrls(SECRET, "https://lab.example/tandem/")
        .sign(a_request(), "/api/v1/x", 60.0)
        .url.startswith("https://lab.example/tandem/api/v1/x?")
    )
    assert (
        SignedUrls(SECRET)
        .sign(a_request("/pre"), "/api/v1/x", 60.0)
        .url.startswith("https://gpu.example:8443/pre/api/v1/x?")
    )
