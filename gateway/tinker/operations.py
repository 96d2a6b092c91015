"""Accepting an operation of a run: whatever is wrong with it, its number is consumed and its sender gets a promise.

The SDK goes on with the next number after a refused submit, so a refusal that is not recorded would make everything
behind it wait. What is wrong is therefore told by the promise's outcome: a failed future of category `user`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from fastapi import Request, Response

from engines.interface import UserError
from gateway.errors import BadRequest, NotFound, TandemError, Unprocessable
from gateway.state import Gateway
from gateway.store.records import Future, Run
from gateway.submit import submit_rejection
from gateway.tinker import requests, schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import BodyTooLarge, in_thread_if_large, json_reply, read_body


class Addressed(Protocol):
    """A body that says which operation of which run it is."""

    model_id: str
    seq_id: int


B = TypeVar("B", bound=Addressed)


def promise(future: Future) -> Response:
    """What a client gets for an accepted call."""
    return json_reply({"request_id": future.request_id, "model_id": future.run_id})


async def accept_json(
    request: Request,
    gateway: Gateway,
    owner: str,
    schema: type[B],
    kind: str,
    submit: Callable[[Run, B], Awaitable[Future]],
) -> Response:
    """Accept an operation that comes as JSON; `submit` does it with the run and the parsed body."""
    raw = await read_body(request)
    try:
        body = await in_thread_if_large(raw, lambda: parse_json(raw, schema))
    except Unprocessable as error:
        envelope = parse_json(raw, schemas.OperationEnvelope)
        run = await gateway.live_run(owner, envelope.model_id)
        return promise(await submit_rejection(gateway, run, envelope.seq_id, kind, error.message))
    run = await gateway.live_run(owner, body.model_id)
    return await accept_or_reject(gateway, run, body.seq_id, kind, lambda: submit(run, body))


async def accept_or_reject(
    gateway: Gateway, run: Run, seq_id: int, kind: str, submit: Callable[[], Awaitable[Future]]
) -> Response:
    """The promise of `submit`, or of a recorded rejection when it finds that the operation cannot be performed."""
    try:
        return promise(await submit())
    except (UserError, BadRequest, NotFound, Unprocessable) as error:
        message = error.message if isinstance(error, TandemError) else str(error)
        return promise(await submit_rejection(gateway, run, seq_id, kind, message))


async def body_of_pass(request: Request, gateway: Gateway, owner: str) -> bytes:
    """The body of a protobuf pass; when it is too large the refusal is recorded before it is answered."""
    try:
        return await read_body(request)
    except BodyTooLarge as error:
        envelope = requests.peek_envelope(error.beginning, request.headers.get("content-encoding"))
        if envelope is not None:
            run = await gateway.live_run(owner, envelope.model_id)
            kind = "forward" if envelope.forward_only else "forward_backward"
            await submit_rejection(gateway, run, envelope.seq_id, kind, error.message)
        raise
