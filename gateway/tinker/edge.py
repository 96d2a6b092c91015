"""Between HTTP and this dialect: bounded bodies in, JSON out, and how a route declares both in the OpenAPI page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from gateway.bodies import SMALL, bodies_of, hold, let_go, read_sent
from gateway.errors import BadRequest, PayloadTooLarge
from gateway.openapi import schema_of
from gateway.state import gateway_of
from gateway.tinker.bodies import decompress, guessed_size
from gateway.tinker.decoding import parse_json

T = TypeVar("T")

_LONGEST_KEY = 300

WORTH_A_THREAD = 64 * 1024
"""Bytes from which a conversion is done in a worker thread; below it the hop costs more than the work."""


async def read_body(request: Request, *, most: int | None = None) -> bytes:
    """The decompressed body, of `most` bytes if that is less than what is allowed to all. Raises PayloadTooLarge,
    UnsupportedMediaType, BadRequest, NoRoom."""
    sent = await sent_body(request)
    if most is not None and len(sent) > most:
        raise PayloadTooLarge(f"the body has {len(sent)} bytes; at most {most} are taken here")
    return await decompressed(request, sent, most)


async def sent_body(request: Request) -> bytes:
    """The body as it was sent. Raises BodyTooLarge and NoRoom."""
    return await read_sent(request, bodies_of(request).largest)


async def decompressed(request: Request, body: bytes, most: int | None = None) -> bytes:
    """What was sent, decompressed as its header says; `most` is less than what is allowed to all."""
    encoding = request.headers.get("content-encoding")
    if encoding is None:
        return body
    room = bodies_of(request).plain
    limit = gateway_of(request).settings.max_decompressed_bytes
    limit = limit if most is None else min(limit, most)
    guess = min(guessed_size(body, encoding), limit)
    if guess < limit:
        await hold(request, room, guess)
        with contextlib.suppress(PayloadTooLarge):
            # always in a thread: a small body can decompress to a large one
            return await asyncio.to_thread(decompress, body, encoding, min(max(guess, SMALL), limit))
        let_go(request, room)  # first, so that two of these do not wait for each other
    await hold(request, room, limit)
    return await asyncio.to_thread(decompress, body, encoding, limit)


async def in_thread_if_large(body: bytes, convert: Callable[[], T]) -> T:
    """Convert at once, or in a worker thread when the body is large."""
    if len(body) < WORTH_A_THREAD:
        return convert()
    return await asyncio.to_thread(convert)


def idempotency_key(request: Request) -> str | None:
    """What stays the same when a call is sent again, where nothing in its body does. Raises BadRequest."""
    key = request.headers.get("x-idempotency-key")
    if key is not None and len(key) > _LONGEST_KEY:
        raise BadRequest(f"X-Idempotency-Key has {len(key)} characters; at most {_LONGEST_KEY} are taken")
    return key


async def json_body(request: Request, schema: type[T]) -> T:
    """The body as a struct. Raises BadRequest when it is not JSON and Unprocessable naming the field otherwise."""
    body = await read_body(request)
    return await in_thread_if_large(body, lambda: parse_json(body, schema))


def json_reply(value: object) -> Response:
    """A value as a JSON answer, with its length, which the SDK needs to trust it."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def moment(seconds: float) -> str:
    """A time as the wire writes it: ISO 8601 with its zone, without which the SDK breaks."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def takes(schema: type[Any], *raw: str) -> dict[str, Any]:
    """OpenAPI description of a body that the route reads itself: JSON, or bytes of the media types of `raw`."""
    content: dict[str, Any] = {"application/json": {"schema": schema_of(schema)}}
    content.update({media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in raw})
    return {"requestBody": {"required": True, "content": content}}
