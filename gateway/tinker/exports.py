"""Downloads: signed addresses of a checkpoint's files, and what answers them.

Clients fetch with a plain GET that carries no key. What is signed is the path, which names the checkpoint, the version
of its files and the file; nothing else of the server is behind such an address.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from gateway.archives import Tar, files_of
from gateway.auth import Owner
from gateway.checkpoints import checkpoint_path, parse_path, readable_checkpoint
from gateway.errors import BadRequest, NotFound
from gateway.signed_urls import SignedUrl
from gateway.state import Gateway, Running
from gateway.store.records import Checkpoint, CheckpointKind
from gateway.tinker.routing import topic

router = topic()

ARCHIVE = "archive.tar"
_BYTES = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/training_runs/{run_id}/checkpoints/{kind}/{name}/archive",
    status_code=302,
    response_class=RedirectResponse,
    responses={302: {"description": "Location: an address of the tar, good until Expires; it needs no key"}},
)
async def archive_checkpoint(
    request: Request, run_id: str, kind: str, name: str, owner: Owner, gateway: Running
) -> RedirectResponse:
    """Where the adapter of a checkpoint can be downloaded as a tar. For SDKs up to 0.34."""
    checkpoint = await _readable(gateway, owner, run_id, kind, name)
    await files_of(gateway.settings, checkpoint)
    signed = _signed(request, gateway, checkpoint, ARCHIVE)
    expires = format_datetime(datetime.fromtimestamp(signed.expires_at, UTC), usegmt=True)
    return RedirectResponse(signed.url, 302, {"Expires": expires, "Cache-Control": "private"})


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls")
async def get_external_weights_urls(
    request: Request, run_id: str, kind: str, name: str, owner: Owner, gateway: Running
) -> dict[str, Any]:
    """An address for each file of external weights, good until `expires`; they need no key."""
    checkpoint = await _readable(gateway, owner, run_id, kind, name)
    if checkpoint.kind is not CheckpointKind.EXTERNAL:
        raise BadRequest(
            f"{checkpoint.path} is no external weights; save_weights_external makes some, /archive has a tar of this"
        )
    files = await files_of(gateway.settings, checkpoint)
    signed = {each.name: _signed(request, gateway, checkpoint, each.name) for each in files}
    expires = min(each.expires_at for each in signed.values())
    moment = datetime.fromtimestamp(expires, UTC).isoformat()
    return {"urls": {each: address.url for each, address in signed.items()}, "expires": moment}


@router.get(
    "/downloads/{version}/{run_id}/{kind}/{name}/{file}",
    response_class=Response,
    responses={200: {"description": "the bytes", "content": {"application/octet-stream": _BYTES}}},
)
async def download(
    version: str,
    run_id: str,
    kind: str,
    name: str,
    file: str,
    gateway: Running,
    expires: Annotated[int, Query(ge=0, le=2**40)],
    signature: Annotated[str, Query(max_length=200)],
) -> Response:
    """A file of a checkpoint, or all as a tar, for whoever has a signed address of it."""
    path = f"{version}/{run_id}/{kind}/{name}/{file}"
    gateway.signed_urls.check(_route(path), expires, signature)
    checkpoint = await gateway.store.checkpoints.get(checkpoint_path(run_id, CheckpointKind(kind), name))
    if checkpoint is None or _version(checkpoint) != version:
        raise NotFound("the checkpoint of this address has been deleted or replaced")
    files = await files_of(gateway.settings, checkpoint)
    headers = {"Cache-Control": "private", "X-Content-Type-Options": "nosniff"}
    if file == ARCHIVE:
        tar = Tar(files, checkpoint.created_at)
        headers |= {
            "Content-Length": str(tar.size),
            "Content-Disposition": f'attachment; filename="{ARCHIVE}"',
        }
        return StreamingResponse(tar.chunks(), headers=headers, media_type="application/x-tar")
    for each in files:
        if each.name == file:
            kind_of_file = "application/octet-stream"
            return FileResponse(each.path, headers=headers, media_type=kind_of_file, filename=each.name)
    raise NotFound(f"the checkpoint has no file {file[:100]!r}")


async def _readable(gateway: Gateway, owner: str, run_id: str, kind: str, name: str) -> Checkpoint:
    path = f"tinker://{run_id}/{kind}/{name}"
    parse_path(path)
    return await readable_checkpoint(gateway.store, owner, path)


def _signed(request: Request, gateway: Gateway, checkpoint: Checkpoint, file: str) -> SignedUrl:
    """An address that is good for `download_url_s`, or as long as the checkpoint is if that is shorter."""
    left = gateway.settings.download_url_s
    if checkpoint.expires_at is not None:
        left = min(left, checkpoint.expires_at - time.time())
    segments = (_version(checkpoint), checkpoint.run_id, checkpoint.kind, checkpoint.name, file)
    return gateway.signed_urls.sign(request, _route("/".join(segments)), left)


def _route(path: str) -> str:
    return f"/api/v1/downloads/{path}"


def _version(checkpoint: Checkpoint) -> str:
    """Which files: a checkpoint that is saved again under its name has others, and old addresses do not lead there."""
    return checkpoint.folder.rpartition("/")[2]
