"""Passing a request on to the gateway that has its engine, as its client sent it, with the client's own key.

The other gateway checks the key as if the client had come to it: there is no way in that only gateways may use. A
request that was passed on is marked, so that it is not passed on again when its engine has just moved.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx
import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.errors import EngineLost, EngineUnavailable
from gateway.openai.errors import error_reply
from gateway.presence import while_connected

logger = logging.getLogger(__name__)

MARK = "x-tandem-passed-on"
_SENT = ("authorization", "x-api-key", "content-type", "accept")
_ANSWERED = ("content-type", "retry-after", "cache-control", "x-accel-buffering")
_TIMEOUT = httpx.Timeout(10.0, connect=3.0, read=600.0)
"""Seconds; to be silent while it works is the engine's right, for as long as clients wait."""
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class Passage:
    """The connections to other gateways. No proxy of the environment is asked for the way."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=_TIMEOUT, limits=_LIMITS, trust_env=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def pass_on(self, request: Request, body: bytes, url: str) -> Response:
        """What the gateway at `url` answers, piece by piece as it comes. Raises EngineUnavailable when it cannot be
        reached, or when the request has been passed on before."""
        if MARK in request.headers:
            raise EngineUnavailable(
                "the engine of this model is just moving between gateways; try again in a moment"
            )
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        address = f"{url.rstrip('/')}{request.url.path}"
        asked = self._client.build_request("POST", address, content=body, headers={**headers, MARK: "1"})
        try:
            answer = await while_connected(request.receive, self._client.send(asked, stream=True))
        except httpx.TransportError as error:
            logger.warning("a request cannot be passed on to %s: %s", url, error)
            raise EngineUnavailable(
                "the gateway that has the engine of this model cannot be reached; try again in a moment"
            ) from error
        return _PassedOn(answer)


class _PassedOn(StreamingResponse):
    """Another gateway's answer; that one is told when the client hangs up."""

    def __init__(self, answer: httpx.Response) -> None:
        headers = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
        self._answer = answer
        self._pieces = _pieces(answer)
        super().__init__(self._pieces, answer.status_code, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._pieces):
                await while_connected(receive, self.stream_response(send))
        except (ClientDisconnect, OSError):
            logger.debug("a client hung up while its request was answered elsewhere")
        finally:
            await self._answer.aclose()


async def _pieces(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body as it comes. A stream that is cut ends with an error event, as it would at its own gateway; any other
    body that is cut cannot be ended well, so its connection is."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.TransportError:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise
        lost = EngineLost("the gateway that answered has gone; send the request again")
        yield b"data: " + msgspec.json.encode(error_reply(lost)[1]) + b"\n\n"
