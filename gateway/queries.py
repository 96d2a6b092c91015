"""Routes that take no parameter in the query which they do not know: a filter that is not applied answers another
question, and a misspelt `dry_run` would delete."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from gateway.auth import caller_of
from gateway.errors import Unprocessable

Answer = Callable[[Request], Coroutine[Any, Any, Response]]
_ECHO = 80
"""Characters of a name that an error repeats."""


class KnownQueryRoute(APIRoute):
    """Refuses by name what stands in the query with a value and is not declared."""

    def get_route_handler(self) -> Answer:
        known, answer = _read_from_query(self.dependant), self.answering()
        private = not {"owner", "caller"}.isdisjoint(inspect.signature(self.endpoint).parameters)

        async def handle(request: Request) -> Response:
            if request.scope["query_string"] and (unknown := _unknown(request, known)) is not None:
                if private:
                    await caller_of(request)  # who has no key learns nothing else
                raise _refusal(unknown, known)
            return await answer(request)

        return handle

    def answering(self) -> Answer:
        """What answers when the query is in order."""
        return super().get_route_handler()


def _read_from_query(dependant: Dependant) -> frozenset[str]:
    """The parameters that a route and what it depends on read from the query."""
    own = frozenset(field.alias for field in dependant.query_params)
    return own.union(*(_read_from_query(each) for each in dependant.dependencies))


def _unknown(request: Request, known: frozenset[str]) -> str | None:
    """A parameter that would be ignored."""
    return next(
        (name for name, value in request.query_params.multi_items() if value and name not in known), None
    )


def _refusal(name: str, known: frozenset[str]) -> Unprocessable:
    allowed = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
    return Unprocessable(
        f"the query has {name[:_ECHO]!r}, which this route does not know; {allowed}", param=name[:_ECHO]
    )
