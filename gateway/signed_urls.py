"""Addresses that carry their own permission: whoever has one may fetch what it names, until it expires.

The official SDK downloads with a plain client that sends no key. What is signed is the path and the moment of expiry,
with HMAC-SHA256 and the installation's secret; nothing is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from fastapi import Request

from gateway.errors import Forbidden

_PURPOSE = b"tandem signed url"


@dataclass(frozen=True, slots=True)
class SignedUrl:
    """An address, and the moment (seconds since the epoch) from which it is refused."""

    url: str
    expires_at: float


class SignedUrls:
    """Signs and checks. `public_url` is what clients put before a path; empty: what they did put there."""

    def __init__(self, secret: bytes, public_url: str = "") -> None:
        self._key = hmac.digest(secret, _PURPOSE, hashlib.sha256)
        self._public_url = public_url.rstrip("/")

    def sign(self, request: Request, path: str, lifetime_s: float) -> SignedUrl:
        """The address of `path`, which begins with a slash and is not yet percent-encoded, for whom `request` is
        answered; good for `lifetime_s` seconds."""
        expires = int(time.time() + lifetime_s)
        base = self._public_url or str(request.base_url).rstrip("/")
        query = urlencode({"expires": expires, "signature": self._signature(path, expires)})
        return SignedUrl(f"{base}{quote(path)}?{query}", float(expires))

    def check(self, path: str, expires: int, signature: str) -> None:
        """Raises Forbidden unless the address was made here for this path and has not expired."""
        if not hmac.compare_digest(self._signature(path, expires).encode(), signature.encode()):
            raise Forbidden("this address was not signed here, or has been changed", param="signature")
        if time.time() >= expires:
            raise Forbidden("this address has expired; ask for a new one", param="expires")

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._key, f"{expires}\n{path}".encode(), hashlib.sha256).hexdigest()
