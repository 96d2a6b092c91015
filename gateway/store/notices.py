"""What gateways of one database tell each other: bounded payloads of Postgres' NOTIFY, sent inside the group commit.

A notice saves a wait and is never the truth: whoever hears it reads the database, and looks there now and then without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

CHANNEL = "tandem"
_LARGEST_BYTES = 7900
"""Postgres takes payloads below 8000 bytes."""


class Notice(NamedTuple):
    """One thing to tell. `accepted`: the future `key` waits for `engine`. `settled`: the future `key` has its outcome.
    `dropped`: the run `key` need not stay in the memory of `engine`. `free`: nobody has the lease of `engine`."""

    kind: Literal["accepted", "settled", "dropped", "free"]
    key: str
    engine: str = ""


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """A payload. `look`: more has happened than fits, so everything is to be looked at. `joined`: its sender has just
    started, or ends."""

    sender: str
    accepted: dict[str, list[str]] = {}
    settled: list[str] = []
    dropped: dict[str, list[str]] = {}
    free: list[str] = []
    look: bool = False
    joined: bool = False


def payload_of(sender: str, notices: Sequence[Notice]) -> str:
    """One payload for all notices of a transaction, bounded."""
    accepted: dict[str, list[str]] = {}
    dropped: dict[str, list[str]] = {}
    for notice in notices:
        if notice.kind == "accepted":
            accepted.setdefault(notice.engine, []).append(notice.key)
        elif notice.kind == "dropped":
            dropped.setdefault(notice.engine, []).append(notice.key)
    settled = [notice.key for notice in notices if notice.kind == "settled"]
    free = [notice.engine for notice in notices if notice.kind == "free"]
    payload = encoded(News(sender, accepted, settled, dropped, free))
    if len(payload.encode()) > _LARGEST_BYTES:
        payload = encoded(News(sender, free=free, look=True))
    return payload


def encoded(news: News) -> str:
    """The payload of some news."""
    return msgspec.json.encode(news).decode()


def decoded(payload: str) -> News:
    """The news of a payload; one that cannot be read (of a newer gateway, say) asks to look at everything."""
    try:
        return msgspec.json.decode(payload, type=News)
    except msgspec.DecodeError:
        return News("", look=True)
