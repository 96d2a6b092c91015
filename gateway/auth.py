"""Who calls: API keys, and what holds while there are none.

With keys, each maps to an owner; only hashes are stored. A token (`gateway.tokens`) counts as the key it was made for.
Without keys every caller is the one local owner, and only programs on this machine are served.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import secrets
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from gateway.errors import BadRequest, Forbidden, InvalidToken, StoreUnavailable, Unauthorized
from gateway.store import Store
from gateway.store.records import ApiKey
from gateway.tokens import PREFIX, Tokens

LOCAL_OWNER = "local"
_REFRESH_S = 2.0
_FRESH_S = 0.1
_STALE_S = 60.0
_FORWARDED = frozenset(
    {
        "forwarded",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-proto",
        "x-real-ip",
    }
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner a request is made for. An admin sees everybody's things in the admin API. `key` is what was presented,
    itself or by a token; none while there are no keys."""

    owner: str
    admin: bool
    key: ApiKey | None = None


class Keys:
    """The configured keys, read again when they are some seconds old, so that a new or removed key counts at once."""

    def __init__(self, store: Store, allowed_hosts: tuple[str, ...], tokens: Tokens) -> None:
        self._store = store
        self._allowed_hosts = allowed_hosts
        self._tokens = tokens
        self._keys: dict[str, ApiKey] = {}
        self._read_at = float("-inf")
        self._due_at = float("-inf")

    async def caller(self, request: Request) -> Caller:
        """Who calls. Raises Unauthorized or Forbidden."""
        await self._refresh_if_due()
        if not self._keys:
            self._refuse_strangers(request)
            return Caller(LOCAL_OWNER, admin=True)
        key = await self._found(presented_key(request))
        return Caller(key.owner, key.admin, key)

    async def owner_of(self, weights_access_token: str | None) -> str | None:
        """Whose checkpoints a token opens for reading: it is an API key, or a token made for one; None opens nobody's.

        Raises BadRequest for one that is not known. Without keys everything belongs to the one local owner.
        """
        if weights_access_token is None:
            return None
        await self._refresh_if_due()
        if not self._keys:
            return LOCAL_OWNER
        try:
            return (await self._found(weights_access_token)).owner
        except Unauthorized as error:
            raise BadRequest(
                "weights_access_token is not known here; it is an API key of the owner whose weights it opens, or a "
                "token that was made for one",
                param="weights_access_token",
            ) from error

    def token_for(self, caller: Caller) -> str:
        """A token that counts as the caller's key for a while."""
        return self._tokens.issue(caller.owner, None if caller.key is None else caller.key.key_hash)

    def forget(self) -> None:
        """A key has been removed by this process: the next request reads them again."""
        self._read_at = self._due_at = float("-inf")

    async def _found(self, presented: str) -> ApiKey:
        """The key that is presented. One that is not known may have been made a moment ago, beside this process or at
        another gateway: they are read again, but not for every stranger. Raises Unauthorized."""
        try:
            return self._key(presented)
        except Unauthorized:
            if time.monotonic() - self._read_at < _FRESH_S:
                raise
            self._due_at = float("-inf")
            await self._refresh_if_due()
            return self._key(presented)

    def _key(self, presented: str) -> ApiKey:
        """The key that is presented, itself or by a token that was made for it. Raises Unauthorized."""
        if presented.startswith(PREFIX):
            key = self._keys.get(self._tokens.key_hash(presented) or "")
            if key is None:
                raise InvalidToken("the API key that this token was made for has been removed")
            return key
        key = self._keys.get(hash_key(presented))
        if key is None:
            raise Unauthorized(
                "this API key is not known here; send one in X-API-Key, or as a Bearer token, that "
                "`python -m gateway.keys add OWNER` has made"
            )
        return key

    async def _refresh_if_due(self) -> None:
        """Read the keys again; those of a minute ago still count while the database does not answer."""
        if time.monotonic() < self._due_at:
            return
        try:
            keys = await self._store.keys.all()
        except StoreUnavailable:
            if time.monotonic() - self._read_at > _STALE_S:
                raise
        else:
            self._keys = {key.key_hash: key for key in keys}
            self._read_at = time.monotonic()
        self._due_at = time.monotonic() + _REFRESH_S  # after an outage too: not every request waits for it

    def _refuse_strangers(self, request: Request) -> None:
        """Without keys: loopback peers only, not through a proxy, not on behalf of a foreign web page."""
        explanation = (
            "no API keys are configured, so only programs on this machine are served, directly; "
            "make a key with `python -m gateway.keys add OWNER` to serve others"
        )
        client = request.client
        if client is None or not _is_loopback(client.host):
            raise Forbidden(
                f"{explanation} (this request comes from {client.host if client else 'an unknown peer'})"
            )
        for name, value in request.headers.items():
            if name in _FORWARDED:
                raise Forbidden(f"{explanation} (this request was forwarded: it has the header {name})")
            if name in ("host", "origin") and _host_of(value) not in self._allowed_hosts:
                raise Forbidden(f"{explanation} (the header {name} names {value!r})")


async def caller_of(request: Request) -> Caller:
    """Dependency: who calls."""
    keys: Keys = request.app.state.keys
    return await keys.caller(request)


async def owner_of(request: Request) -> str:
    """Dependency: the owner that the request is made for."""
    return (await caller_of(request)).owner


Owner = Annotated[str, Depends(owner_of)]
"""Parameter of a route: the owner that the request is made for."""

Who = Annotated[Caller, Depends(caller_of)]
"""Parameter of a route: the owner, and whether the key is an admin's."""


def presented_key(request: Request) -> str:
    """The key that a request carries. Raises Unauthorized when it carries none."""
    key = request.headers.get("x-api-key")
    if key is None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else None
    if not key:
        raise Unauthorized(
            "an API key is needed: send it in the header X-API-Key, or as `Authorization: Bearer KEY`"
        )
    return key


def new_key() -> str:
    """A fresh key. The official SDK accepts only keys that begin with `tml-`."""
    return "tml-" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key. It is random and long, so a plain hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@functools.lru_cache(maxsize=1024)
def _host_of(value: str) -> str:
    """The host of a Host or Origin header, without scheme and port."""
    authority = value.rpartition("//")[2]
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return authority.partition(":")[0].lower()
