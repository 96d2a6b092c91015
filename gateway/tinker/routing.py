"""How this dialect's routes are declared: flat and resolved at once, since every step of training passes through them.

Measured per request on the smallest call: FastAPI's nested routers and its way of finding out parameters take as much
processor time as everything that a route then does (docs/decisions.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from gateway.auth import owner_of
from gateway.errors import Unprocessable
from gateway.state import gateway_of

_PLAIN = ["request", "owner", "gateway"]


class TinkerRoute(APIRoute):
    """A route that takes just the request, its owner and the gateway is called with them directly; the declared
    dependencies are the same two. Any other goes FastAPI's way. What a query has and the route does not know
    is refused."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, known = self.endpoint, _read_from_query(self.dependant)
        answer = super().get_route_handler()
        plain = list(inspect.signature(endpoint).parameters) == _PLAIN

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                _refuse_unknown(request, known)
            if not plain:
                return await answer(request)
            response: Response = await endpoint(request, await owner_of(request), gateway_of(request))
            return response

        return handle


def _read_from_query(dependant: Dependant) -> frozenset[str]:
    """The parameters that a route and what it depends on read from the query."""
    own = frozenset(field.alias for field in dependant.query_params)
    return own.union(*(_read_from_query(each) for each in dependant.dependencies))


def _refuse_unknown(request: Request, known: frozenset[str]) -> None:
    """A filter that is not applied would answer another question. Raises Unprocessable."""
    for name, value in request.query_params.multi_items():
        if value and name not in known:
            allowed = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise Unprocessable(
                f"the query has {name[:80]!r}, which this route does not know; {allowed}", param=name[:80]
            )


def topic() -> APIRouter:
    """A router for one topic of the dialect. Its routes have their whole path, so that the application can hold them
    in one flat list."""
    return APIRouter(prefix="/api/v1", tags=["tinker"], route_class=TinkerRoute)
