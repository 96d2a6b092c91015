"""Accepting an operation of a run: whatever is wrong with it, its number is consumed and its sender gets a promise.

The SDK goes on with the next number after a refused submit, so a refusal that is not recorded would make everything
behind it wait. What is wrong is therefore told by the promise's outcome: a failed future of category `user`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import msgspec
from fastapi import Request, Response

from engines.interface import UserError
from gateway.bodies import BEGINNING, BodyTooLarge
from gateway.errors import BadRequest, NotFound, PayloadTooLarge, TandemError, Unprocessable
from gateway.state import Gateway
from gateway.store.records import Future, Run
from gateway.submit import submit_rejection
from gateway.tinker import requests, schemas
from gateway.tinker import wire_pb2 as wire
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import (
    decompressed,
    idempotency_key,
    in_thread_if_large,
    json_reply,
    read_body,
    sent_body,
)
from gateway.turns import Turn, digest_of


class Addressed(Protocol):
    """A body that says which operation of which run it is."""

    @property
    def model_id(self) -> str: ...

    @property
    def seq_id(self) -> int | None: ...


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
    submit: Callable[[Run, Turn, B], Awaitable[Future]],
    common: Callable[[B], B] | None = None,
) -> Response:
    """Accept an operation that comes as JSON; `submit` does it with the run, its turn and the parsed body.

    `common` is what a body has in common with itself sent again, where that is not all of it.
    """
    raw = await read_body(request)
    digest = await digest_of_call(request, raw)
    try:
        body = await in_thread_if_large(raw, lambda: parse_json(raw, schema))
    except Unprocessable as error:
        envelope = parse_json(raw, schemas.OperationEnvelope)
        if envelope.seq_id is None:
            raise
        turn = Turn(envelope.seq_id, digest=digest)
        return await reject(gateway, owner, envelope.model_id, turn, kind, error.message)
    if common is not None:
        digest = await digest_of_call(request, msgspec.json.encode(common(body)))
    run = await gateway.live_run(owner, body.model_id)
    async with gateway.turns.turn(run.run_id, body.seq_id, idempotency_key(request), digest) as turn:
        return await accept_or_reject(gateway, run, turn, kind, lambda: submit(run, turn, body))


async def digest_of_call(request: Request, body: bytes) -> bytes:
    """What a repetition of a call has in common with it, and no other call."""
    route = request.url.path.rpartition("/")[2]
    return await in_thread_if_large(body, lambda: digest_of(route, body))


async def reject(
    gateway: Gateway, owner: str, model_id: str, turn: Turn, kind: str, message: str
) -> Response:
    """The promise of a recorded rejection. Raises NotFound and Gone."""
    run = await gateway.live_run(owner, model_id)
    return promise(await submit_rejection(gateway, run, turn, kind, message))


async def accept_or_reject(
    gateway: Gateway, run: Run, turn: Turn, kind: str, submit: Callable[[], Awaitable[Future]]
) -> Response:
    """The promise of `submit`, or of a recorded rejection when it finds that the operation cannot be performed."""
    try:
        return promise(await submit())
    except (UserError, BadRequest, NotFound, Unprocessable) as error:
        message = error.message if isinstance(error, TandemError) else str(error)
        return promise(await submit_rejection(gateway, run, turn, kind, message))


async def message_of_pass(
    request: Request, gateway: Gateway, owner: str
) -> tuple[bytes, wire.ForwardBackwardRequest]:
    """Body and message of a protobuf pass.

    When the body is too large or broken and still says which operation it was to be, the refusal is recorded before it
    is answered.
    """
    encoding = request.headers.get("content-encoding")
    beginning = b""
    try:
        sent = await sent_body(request)
        beginning = sent[:BEGINNING]
        body = await decompressed(request, sent)
        return body, await in_thread_if_large(body, lambda: requests.parse_forward_backward(body))
    except (PayloadTooLarge, BadRequest) as error:
        if isinstance(error, BodyTooLarge):
            beginning = error.beginning
        envelope = requests.peek_envelope(beginning, encoding)
        if envelope is not None:
            kind = "forward" if envelope.forward_only else "forward_backward"
            await reject(gateway, owner, envelope.model_id, Turn(envelope.seq_id), kind, error.message)
        raise
