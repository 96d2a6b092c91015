"""Decompression with a bound: a small body must not become an enormous one, in bytes or in time."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from gateway.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

_WINDOW = 128 << 20
_USUAL_RATIO = 16
_PIECE = 512
"""Bytes fed at a time: zstd can make 128 KiB of four bytes, so a piece becomes at most some MiB."""
_MOST_FRAMES = 1000
"""Each frame of a body costs a decompressor of its own, even when nothing is in it."""


class _Frame(Protocol):
    """What zlib and zstandard call a decompression object: it takes one frame and keeps what follows."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """The body behind a Content-Encoding: none, identity, gzip or zstd; at most `limit` bytes.

    Raises UnsupportedMediaType, PayloadTooLarge, or BadRequest when the body is not what the header says.
    """
    name = (encoding or "identity").strip().lower()
    match name:
        case "identity" | "":
            return body if len(body) <= limit else _bounded(iter((body,)), limit)
        case "zstd":
            return _bounded(_pieces(body, name, _zstd_frame), limit)
        case "gzip":
            return _bounded(_pieces(body, name, _gzip_frame), limit)
        case other:
            raise UnsupportedMediaType(
                f"Content-Encoding is {other[:40]!r}; allowed are identity, gzip and zstd"
            )


def guessed_size(body: bytes, encoding: str | None) -> int:
    """What a body probably decompresses to: what its first zstd frame says, or several times what was sent."""
    if (encoding or "").strip().lower() == "zstd":
        with contextlib.suppress(zstandard.ZstdError):
            said = zstandard.get_frame_parameters(body).content_size
            if said != zstandard.CONTENTSIZE_UNKNOWN:
                return said
    return _USUAL_RATIO * len(body)


def decompressed_beginning(body: bytes) -> bytes:
    """What the first bytes of a zstd body decompress to, as far as they go; nothing if they are no zstd."""
    try:
        return _zstd_frame().decompress(body[:_PIECE])
    except zstandard.ZstdError:
        return b""


def _bounded(pieces: Iterator[bytes], limit: int) -> bytes:
    plain = io.BytesIO()  # one buffer: parts that are joined at the end would be there twice
    for piece in pieces:
        if plain.tell() + len(piece) > limit:
            raise PayloadTooLarge(
                f"the body decompresses to more than {limit} bytes (setting max_decompressed_bytes)"
            )
        plain.write(piece)
    return plain.getvalue()


def _pieces(body: bytes, name: str, new_frame: Callable[[], _Frame]) -> Iterator[bytes]:
    """What the frames of a body hold, in pieces of some MiB at most."""
    start = 0
    for _ in range(_MOST_FRAMES):
        frame = new_frame()
        while not frame.eof:
            piece = body[start : start + _PIECE]
            if not piece:
                raise BadRequest(f"the body ends in the middle of its {name} data")
            start += len(piece)
            try:
                plain = frame.decompress(piece)
            except (zlib.error, zstandard.ZstdError) as error:
                raise BadRequest(f"the body is not {name} as its Content-Encoding says: {error}") from error
            yield plain
        start -= len(frame.unused_data)
        if start == len(body):
            return
    raise BadRequest(f"the body has more than {_MOST_FRAMES} {name} frames; compress it as one")


def _zstd_frame() -> _Frame:
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()


def _gzip_frame() -> _Frame:
    return zlib.decompressobj(wbits=31)
