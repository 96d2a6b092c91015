"""Between HTTP and this dialect: bounded bodies in, JSON out, and how a route declares both in the OpenAPI page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from gateway.errors import BadRequest, PayloadTooLarge
from gateway.openapi import schema_of
from gateway.state import gateway_of
from gateway.tinker.bodies import decompress
from gateway.tinker.decoding import parse_json

T = TypeVar("T")

BEGINNING = 1024
"""Bytes of a body that are enough to find out whose operation it was to be."""
_DRAINED = 4
_LONGEST_KEY = 300

WORTH_A_THREAD = 64 * 1024
"""Bytes from which a conversion is done in a worker thread; below it the hop costs more than the work."""


async def read_body(request: Request) -> bytes:
    """The decompressed body. Raises PayloadTooLarge, UnsupportedMediaType, BadRequest."""
    return await decompressed(request, await read_sent(request))


async def decompressed(request: Request, body: bytes) -> bytes:
    """What was sent, decompressed as its header says."""
    encoding = request.headers.get("content-encoding")
    if encoding is None:
        return body
    # always in a thread: a small body can decompress to a large one
    return await asyncio.to_thread(
        decompress, body, encoding, gateway_of(request).settings.max_decompressed_bytes
    )


class BodyTooLarge(PayloadTooLarge):
    """Over the limit. `beginning` is what came first of it, for finding out whose operation this was to be."""

    def __init__(self, limit: int, beginning: bytes) -> None:
        super().__init__(
            f"the body is larger than {limit} bytes (setting max_body_bytes); send it in smaller parts"
        )
        self.beginning = beginning


async def read_sent(request: Request) -> bytes:
    """The body as it was sent. Raises BodyTooLarge."""
    limit = gateway_of(request).settings.max_body_bytes
    chunks: list[bytes] = []
    beginning = b""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
            continue
        beginning = beginning or b"".join(chunks)[:BEGINNING] or chunk[:BEGINNING]
        chunks.clear()
        if size > _DRAINED * limit:  # most clients read the answer only after they have sent everything
            break
    if size > limit:
        raise BodyTooLarge(limit, beginning)
    return b"".join(chunks)


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


def takes(schema: type[Any], *raw: str) -> dict[str, Any]:
    """OpenAPI description of a body that the route reads itself: JSON, or bytes of the media types of `raw`."""
    content: dict[str, Any] = {"application/json": {"schema": schema_of(schema)}}
    content.update({media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in raw})
    return {"requestBody": {"required": True, "content": content}}
