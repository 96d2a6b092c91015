"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engines.interface import UserError
from gateway.errors import BadRequest, NotFound, TandemError


class InvalidValue(BadRequest):
    """A field's value is of the wrong type or outside what is allowed."""

    code = "invalid_value"


class UnsupportedParameter(BadRequest):
    """A field that this server cannot honour has a value that means something."""

    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    """Prompt and continuation together are longer than the model's context."""

    code = "context_length_exceeded"


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong: a sentence, a class of errors, the field to blame, a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    """Body of every answer that is not a success, and of the event that ends a broken stream."""

    error: ErrorDetail


HUNG_UP = 499
"""Status in logs for a request whose client did not wait for the answer; nobody receives it."""

_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}
_OURS = (TandemError, UserError, HTTPException, RequestValidationError)


def error_reply(error: Exception, error_id: str | None = None) -> tuple[int, ErrorReply]:
    """HTTP status and body for an error. One that is nobody's plan is 500 and keeps its text to itself; `error_id`
    is what to look for in the log."""
    if isinstance(error, TandemError):
        code = "model_not_found" if isinstance(error, NotFound) else error.code
        return _reply(error.status, error.message, error.param, code)
    if isinstance(error, UserError):
        return _reply(400, str(error), None, "invalid_value")
    if isinstance(error, HTTPException):
        return _reply(error.status_code, str(error.detail), None, _HTTP_CODES.get(error.status_code))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return _reply(400, f"Invalid {param!r}: {first['msg']}.", param, "invalid_value")
    where = f" under the error id {error_id}" if error_id else ""
    return _reply(500, f"The server failed; its log says why{where}.", None, "internal_error")


def _reply(status: int, message: str, param: str | None, code: str | None) -> tuple[int, ErrorReply]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, ErrorReply(ErrorDetail(message, kind, param, code))


def render_error(error: Exception, error_id: str | None = None) -> Response:
    """The answer to a request that failed with this error."""
    status, reply = error_reply(error, error_id)
    headers = dict(error.headers) if isinstance(error, TandemError) else None
    return Response(msgspec.json.encode(reply), status, headers, media_type="application/json")


class OpenAIRoute(APIRoute):
    """A route whose errors are answered in this dialect, whatever the application does elsewhere."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_or_explain(request: Request) -> Response:
            try:
                return await answer(request)
            except _OURS as error:
                return render_error(error)
            except ClientDisconnect:
                return Response(status_code=HUNG_UP)

        return answer_or_explain
