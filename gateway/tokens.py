"""Short-lived tokens that clients get for their API key and send in its place: signed JWTs (HS256).

A token names the key it was made for by its hash, so removing the key ends it; nothing else is stored. The secret is
the installation's, kept in the database: tokens outlive a restart, and every gateway of one database takes them.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import quote

import jwt

from gateway.errors import InvalidToken

ORGANIZATION = "tandem"
"""All owners of an installation are one organization."""
URN = "tml:user:"
PREFIX = "eyJ"
"""How every JWT begins, and no API key of ours: the SDK tells them apart by it too."""
_ALGORITHM = "HS256"
_ISSUER = "tandem"
_PURPOSE = b"tandem tokens"
_REMEMBERED = 10_000
_NEEDED = ["exp", "iat", "iss", "sub"]


@dataclass(frozen=True, slots=True)
class _Known:
    key_hash: str | None
    expires_at: float


class Tokens:
    """Makes and reads tokens that live for `lifetime_s` seconds."""

    def __init__(self, secret: bytes, lifetime_s: float) -> None:
        self._key = hmac.digest(secret, _PURPOSE, hashlib.sha256)
        self._lifetime_s = lifetime_s
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def issue(self, owner: str, key_hash: str | None) -> str:
        """A token for an owner; `key_hash` is of the key that it stands for, none: of a gateway without keys."""
        now = time.time()
        claims = {
            "iss": _ISSUER,
            "sub": owner_urn(owner),
            "org_id": ORGANIZATION,
            "iat": int(now),
            "exp": int(now + self._lifetime_s),
            "jti": secrets.token_hex(8),
            "key": key_hash,
        }
        if "@" in owner:
            claims["email"] = owner
        return jwt.encode(claims, self._key, _ALGORITHM)

    def key_hash(self, token: str) -> str | None:
        """Which key a token stands for. Raises InvalidToken when it was not made here or has expired."""
        known = self._known.get(token)
        if known is None:
            known = self._read(token)
            self._known[token] = known
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if time.time() >= known.expires_at:
            raise InvalidToken("this token has expired; exchange the API key for a new one")
        return known.key_hash

    def _read(self, token: str) -> _Known:
        try:
            claims = jwt.decode(
                token, self._key, algorithms=[_ALGORITHM], issuer=_ISSUER, options={"require": _NEEDED}
            )
        except jwt.ExpiredSignatureError as error:
            raise InvalidToken("this token has expired; exchange the API key for a new one") from error
        except jwt.InvalidTokenError as error:
            raise InvalidToken("this token was not made here; exchange the API key for one") from error
        return _Known(claims.get("key"), float(claims["exp"]))


def owner_urn(owner: str) -> str:
    """An owner as the wire names people."""
    return f"{URN}{quote(owner, safe='@')}"
