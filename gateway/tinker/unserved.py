"""What a newer SDK may send and this server does not have."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.auth import owner_of
from gateway.errors import BadRequest, NotFound, Unprocessable
from gateway.state import Running
from gateway.tinker import schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.edge import read_body
from gateway.tinker.operations import digest_of_call, reject
from gateway.turns import Turn

router = APIRouter(prefix="/api/v1")


@router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
async def unserved(request: Request, path: str, gateway: Running) -> Response:
    """404 (never 405, which the SDK takes worse), except for an operation of a run.

    Its sender goes on with the next number, which would wait for this one. So it is recorded as failed, by name.
    """
    missing = NotFound(f"Not Found: {request.method} /api/v1/{path[:200]}")
    if request.method != "POST":
        raise missing
    owner = await owner_of(request)
    body = await read_body(request)
    try:
        envelope = parse_json(body, schemas.OperationEnvelope)
    except (BadRequest, Unprocessable) as error:
        raise missing from error
    if envelope.seq_id is None:
        raise missing
    message = (
        f"POST /api/v1/{path[:200]} is not served here; this server is older than the SDK that asks for it"
    )
    turn = Turn(envelope.seq_id, digest=await digest_of_call(request, body))
    return await reject(gateway, owner, envelope.model_id, turn, "unserved", message)
