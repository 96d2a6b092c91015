"""Losses that clients have traced: accepted here, carried by the operations that use them.

A loss is stored under a name that follows from its session and number, so that a repeated request finds the first one,
and the name is also the promise that is answered: there is nothing to wait for.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import Request, Response

from engines.graphs import CustomLoss, GraphInput, GraphNode, decode_loss, encode_loss
from engines.interface import UserError
from engines.losses import CUSTOM
from engines.losses.graph import check_graph
from engines.operations import Forward, ForwardBackward
from gateway.auth import Owner
from gateway.errors import NumberTaken, Unprocessable
from gateway.state import Gateway, Running
from gateway.store.records import Run, StoredLoss
from gateway.tinker import schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import in_thread_if_large, json_reply, read_body, takes
from gateway.tinker.routing import topic

router = topic()

MAX_BODY_BYTES = 1 << 20
"""Of a traced loss; larger ones are refused before they are read as JSON."""
MAX_LOSSES = 1000
"""Of one session."""
_MARK = ":loss:"
_SINCE = (0, 36)
"""The first SDK that uploads losses."""


@router.post("/create_custom_loss", openapi_extra=takes(schemas.CreateCustomLoss))
async def create_custom_loss(request: Request, owner: Owner, gateway: Running) -> Response:
    """Take a traced loss, which `forward_backward` then computes. What cannot be computed here fails by its promise."""
    raw = await read_body(request, most=MAX_BODY_BYTES)
    body = await in_thread_if_large(raw, lambda: parse_json(raw, schemas.CreateCustomLoss))
    session = await gateway.live_session(owner, body.session_id)
    if body.custom_loss_seq_id >= MAX_LOSSES:
        raise Unprocessable(
            f"custom_loss_seq_id is {body.custom_loss_seq_id}; a session has at most {MAX_LOSSES} custom losses",
            param="custom_loss_seq_id",
        )
    loss = _loss_of(body)
    error = None
    try:
        check_graph(loss)
    except UserError as refusal:
        error = str(refusal).replace("\0", "\\0")
    stored = StoredLoss(
        loss_id=f"{session.session_id}{_MARK}{body.custom_loss_seq_id}",
        owner=owner,
        session_id=session.session_id,
        name=loss.name,
        body=b"" if error is not None else encode_loss(loss),
        error=error,
        created_at=time.time(),
    )
    await gateway.store.custom_losses.create(stored)
    first = await gateway.known_losses.get(stored.loss_id)
    if first is not None and replace(stored, created_at=first.created_at) != first:
        raise NumberTaken(
            f"custom_loss_seq_id is that of another loss: {body.custom_loss_seq_id} of this session is "
            f"{first.name[:80]!r}, and this {loss.name[:80]!r} is not the same sent again",
            param="custom_loss_seq_id",
        )
    return json_reply({"request_id": stored.loss_id})


def _loss_of(body: schemas.CreateCustomLoss) -> CustomLoss:
    inputs = tuple(GraphInput(entry.name, entry.rank) for entry in body.inputs)
    nodes = tuple(
        GraphNode(node.op, node.name, node.target, node.args, node.kwargs) for node in body.graph.nodes
    )
    return CustomLoss(body.name, inputs, nodes)


async def outcome_of_loss(gateway: Gateway, owner: str, request_id: str) -> dict[str, Any] | None:
    """What became of a custom loss, if the id is one of the caller's."""
    if _MARK not in request_id:
        return None
    stored = await gateway.known_losses.get(request_id)
    if stored is None or stored.owner != owner:
        return None
    if stored.error is not None:
        return {"error": stored.error, "category": "user"}
    return {"loss_id": stored.loss_id, "type": "create_custom_loss"}


async def with_custom_loss(
    gateway: Gateway, run: Run, operation: Forward | ForwardBackward
) -> Forward | ForwardBackward:
    """The operation with the loss that it names in it; one with a built-in loss stays as it is. Raises UserError."""
    if operation.loss != CUSTOM:
        return operation
    loss_id = operation.loss_config.get("loss_id")
    if not isinstance(loss_id, str) or len(operation.loss_config) != 1:
        raise UserError("loss_fn is 'custom'; its loss_fn_config is {'loss_id': …}, from create_custom_loss")
    stored = await gateway.known_losses.get(loss_id)
    if stored is None or stored.owner != run.owner or stored.error is not None:
        raise UserError(f"loss_fn_config['loss_id'] is {loss_id[:80]!r}; there is no such custom loss")
    if stored.session_id != run.session_id:
        raise UserError(
            f"loss_fn_config['loss_id'] is {loss_id[:80]!r}, a loss of another session; create it in the session of "
            "this run"
        )
    return msgspec.structs.replace(operation, loss_config={}, custom=decode_loss(stored.body))


def uploads_losses(gateway: Gateway, sdk_version: str | None) -> bool:
    """Whether a client is told to upload its traced losses: when it can, and every engine that trains computes them.

    Otherwise it computes them itself, which any engine can serve.
    """
    if not gateway.settings.custom_loss_server_side or not _knows_losses(sdk_version or ""):
        return False
    infos = [
        dispatcher.supervisor.info
        for dispatcher in gateway.fleet.dispatchers.values()
        if "train" in dispatcher.supervisor.engine.roles
    ]
    return all(info is not None and CUSTOM in info.losses for info in infos)


def _knows_losses(sdk_version: str) -> bool:
    parts = sdk_version.split(".")[:2]
    return len(parts) == 2 and all(part.isdecimal() for part in parts) and tuple(map(int, parts)) >= _SINCE
