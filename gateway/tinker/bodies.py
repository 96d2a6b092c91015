"""Decompression with a bound: a small body must not become an enormous one."""

from __future__ import annotations

import zlib

import zstandard

from gateway.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

_WINDOW = 128 << 20
_PIECE = 512
"""Bytes fed at a time: zstd can make 128 KiB of four bytes, so a piece becomes at most some MiB."""


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body behind a Content-Encoding: identity, gzip or zstd, at most `limit` bytes.

    Raises UnsupportedMediaType, PayloadTooLarge, or BadRequest when the body is not what the header says.
    """
    match encoding.strip().lower():
        case "identity" | "":
            return body
        case "zstd":
            return _zstd(body, limit)
        case "gzip":
            return _gzip(body, limit)
        case other:
            raise UnsupportedMediaType(
                f"Content-Encoding is {other[:40]!r}; allowed are identity, gzip and zstd"
            )


def _zstd(body: bytes, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    rest = body
    try:
        while rest:
            frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
            for start in range(0, len(rest), _PIECE):
                part = frame.decompress(rest[start : start + _PIECE])
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
                if frame.eof:
                    rest = frame.unused_data + rest[start + _PIECE :]
                    break
            else:
                raise BadRequest("the body ends in the middle of a zstd frame")
    except zstandard.ZstdError as error:
        raise BadRequest(f"the body is not zstd as its Content-Encoding says: {error}") from error
    return b"".join(parts)


def decompressed_beginning(body: bytes) -> bytes:
    """What the first bytes of a zstd body decompress to, as far as they go; nothing if they are no zstd."""
    try:
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj().decompress(body[:_PIECE])
    except zstandard.ZstdError:
        return b""


def _gzip(body: bytes, limit: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=31)
    try:
        data = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is not gzip as its Content-Encoding says: {error}") from error
    if len(data) > limit:
        raise _too_large(limit)
    if not decompressor.eof:
        raise BadRequest("the body ends in the middle of its gzip stream")
    return data


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body decompresses to more than {limit} bytes (setting max_decompressed_bytes)"
    )
