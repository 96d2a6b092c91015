"""How this dialect's routes are declared: flat and resolved at once, since every step of training passes through them.

Measured per request on the smallest call: FastAPI's nested routers and its way of finding out parameters take as much
processor time as everything that a route then does (docs/decisions.md).
"""

from __future__ import annotations

import inspect

from fastapi import APIRouter, Request, Response

from gateway.auth import owner_of
from gateway.queries import Answer, KnownQueryRoute
from gateway.state import gateway_of

_PLAIN = ["request", "owner", "gateway"]


class TinkerRoute(KnownQueryRoute):
    """A route that takes just the request, its owner and the gateway is called with them directly; the declared
    dependencies are the same two. Any other goes FastAPI's way."""

    def answering(self) -> Answer:
        if list(inspect.signature(self.endpoint).parameters) != _PLAIN:
            return super().answering()
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(request, await owner_of(request), gateway_of(request))
            return response

        return handle


def topic() -> APIRouter:
    """A router for one topic of the dialect. Its routes have their whole path, so that the application can hold them
    in one flat list."""
    return APIRouter(prefix="/api/v1", tags=["tinker"], route_class=TinkerRoute)
