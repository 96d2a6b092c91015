"""Lists in pages: a cursor is where the last page ended, opaque to the client."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from gateway.errors import BadRequest

T = TypeVar("T")
Position = tuple[float, str]


def encode_cursor(position: Position) -> str:
    """The cursor behind a row, given its time and its id."""
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> Position | None:
    """Where to go on. Raises BadRequest for what no list has handed out."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        time, key = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=tuple[float, str])
    except (ValueError, msgspec.DecodeError) as error:
        raise _broken(cursor) from error
    if "\0" in key:
        raise _broken(cursor)  # no id holds NUL, and Postgres refuses it
    return time, key


def _broken(cursor: str) -> BadRequest:
    return BadRequest(
        f"cursor is {cursor[:100]!r}; it must be the next_cursor of an earlier answer", param="cursor"
    )


def next_cursor(rows: Sequence[T], limit: int, position: Callable[[T], Position]) -> str | None:
    """The cursor behind a page; None when it is the last one."""
    return encode_cursor(position(rows[-1])) if len(rows) == limit else None
