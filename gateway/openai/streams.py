"""Events that go, and answers that nobody waits for any more."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engines.interface import UserError
from gateway.errors import TandemError
from gateway.openai.continuation import Piece
from gateway.openai.errors import error_reply
from gateway.openai.plan import off_loop
from gateway.openai.rendering import Rendering
from gateway.openai.sampling import Usage
from gateway.presence import while_connected

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A stream that closes its source at its end, whatever ends it, even before the first event was taken."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Piece, None]) -> None:
        # A proxy that buffers would hold the events back.
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Closing events that have not begun would not reach the source.
        async with aclosing(self._source), aclosing(self._events):
            try:
                await while_connected(receive, self.stream_response(send))
            except (ClientDisconnect, OSError):
                # OSError is how some servers tell it to whoever sends.
                logger.debug("a client hung up during its stream")


async def events(
    rendering: Rendering,
    first: Piece,
    rest: AsyncGenerator[Piece, None],
    usage: Usage,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer whose first piece is there already, up to `[DONE]` or the error that ends it."""
    for opening in rendering.opening():
        yield _event(opening)
    try:
        async for piece in _following(first, rest):
            if event := await off_loop(len(piece.tokens), _shown, rendering, piece):
                yield event
        if include_usage:
            yield _event(rendering.closing(usage))
        yield b"data: [DONE]\n\n"
    except (TandemError, UserError) as error:
        yield _event(error_reply(error)[1])
    except Exception as error:  # broad: the status line is sent, so no handler can tell the client any more
        error_id = secrets.token_hex(4)
        logger.exception("stream failed, error id %s", error_id)
        yield _event(error_reply(error, error_id)[1])


async def _following(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


def _shown(rendering: Rendering, piece: Piece) -> bytes:
    """The event of a piece; b"" when it has nothing to tell."""
    event = rendering.event(piece)
    return b"" if event is None else _event(event)


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
