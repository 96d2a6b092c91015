"""Every error that a client can be answered with, in one tree; `gateway.app` has the one handler.

A class's docstring says when it is used. The status decides what the official SDK does: it retries 408, 409, 429 and
5xx for minutes, so those stand only for conditions that pass by themselves, and those derive from `Passing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TandemError(Exception):
    """Base of all: an HTTP status, a stable code for programs, a sentence for people.

    `param` names the request's field when one is to blame.
    """

    status = 500
    code = "internal_error"
    headers: ClassVar[Mapping[str, str]] = {}
    """Of the answer, besides the usual ones."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(TandemError):
    """The request cannot be understood or asks for something that is refused."""

    status = 400
    code = "bad_request"


class Unauthorized(TandemError):
    """No API key, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class InvalidToken(Unauthorized):
    """A token in place of a key that has expired, was not made here, or whose key has been removed.

    The header tells the official SDK to exchange its key again and to repeat the request, once.
    """

    code = "invalid_token"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class Forbidden(TandemError):
    """The caller is known and may not do this."""

    status = 403
    code = "forbidden"


class NotFound(TandemError):
    """There is no such thing, or it is somebody else's."""

    status = 404
    code = "not_found"


class Gone(TandemError):
    """It was there: a finished session, an expired future."""

    status = 410
    code = "gone"


class PayloadTooLarge(TandemError):
    """The body, or what it decompresses to, is over the limit that the message names."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(TandemError):
    """Content-Type or Content-Encoding is none of those that the message names."""

    status = 415
    code = "unsupported_media_type"


class Unprocessable(TandemError):
    """The body is well-formed, and a field of it is not acceptable."""

    status = 422
    code = "unprocessable"


class Passing(TandemError):
    """Base of what passes by itself; the header says when to try again, in seconds."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class NumberTaken(TandemError):
    """The number or key of this call is that of another one, which stays as it is. It cannot be recorded as failed: its
    place in the log is taken."""

    status = 422
    code = "number_taken"


class TooManyRequests(Passing):
    """A queue of this caller's is full; it empties by itself."""

    status = 429
    code = "too_many_requests"


class NoRoom(Passing):
    """The bodies of other requests take all the memory that there is for them, or this one came too slowly."""

    status = 503
    code = "no_room"


class EngineUnavailable(Passing):
    """The engine for this model is starting or restarting; trying again later helps."""

    status = 503
    code = "engine_unavailable"


class EngineElsewhere(EngineUnavailable):
    """Another gateway has the engine of this model, ready, and has told no address (its setting `internal_url`) at
    which what is not stored could be answered."""

    code = "engine_elsewhere"

    def __init__(self, base_model: str, url: str) -> None:
        super().__init__(
            f"the engine of {base_model} is at another gateway, which has told no address (its setting internal_url), "
            "so this request cannot be passed on to it"
        )
        self.url = url


class ModelNotLoadable(TandemError):
    """The engine of this model cannot load it; the message says what the operator has to change."""

    status = 400
    code = "model_not_loadable"


class EngineLost(Passing):
    """The engine process died while it worked on this request, which could not be repeated."""

    status = 503
    code = "engine_lost"


class EngineFailed(TandemError):
    """The engine could not finish this request; its log says why, under the id in the message."""

    status = 500
    code = "engine_failed"

    def __init__(self, message: str, *, error_id: str | None = None) -> None:
        super().__init__(message)
        self.error_id = error_id


class EngineDiedOverIt(TandemError):
    """Engines have died over this request, and over nothing else; it would kill the next one too."""

    status = 422
    code = "engine_died"


class StoreUnavailable(Passing):
    """The database does not answer or has no room; nothing was accepted."""

    status = 503
    code = "store_unavailable"


class StorageUnavailable(Passing):
    """The storage at `storage_url` does not answer; its log says why, under the id in the message."""

    status = 503
    code = "storage_unavailable"


class ConfigurationError(Exception):
    """The gateway cannot start with these settings; the message says which one and what is allowed."""
