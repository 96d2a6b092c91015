"""The tokenizer of a served model, for clients that cannot get it elsewhere."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from gateway.auth import owner_of
from gateway.errors import EngineUnavailable, NotFound
from gateway.queries import KnownQueryRoute
from gateway.state import Gateway, Running

router = APIRouter(
    prefix="/api/v1/tokenizer",
    tags=["models"],
    dependencies=[Depends(owner_of)],
    route_class=KnownQueryRoute,
)

ModelName = Annotated[str, Query(description="name of a served base model", max_length=300)]


@router.get("")
async def describe_tokenizer(model: ModelName, gateway: Running) -> dict[str, Any]:
    """The files of a model's tokenizer with their sizes, and a revision that changes when any of them does."""
    files = _files(gateway, model)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return {
        "model": model,
        "revision": digest.hexdigest()[:40],
        "files": {name: len(files[name]) for name in sorted(files)},
    }


@router.get("/{file}")
async def download_tokenizer_file(file: str, model: ModelName, gateway: Running) -> Response:
    """One file of a model's tokenizer."""
    files = _files(gateway, model)
    if file not in files:
        raise NotFound(f"the tokenizer of {model} has no file {file!r}; it has {', '.join(sorted(files))}")
    return Response(files[file], media_type="application/octet-stream")


def _files(gateway: Gateway, model: str) -> dict[str, bytes]:
    """From any engine of the model that has been ready."""
    supervisors = [dispatcher.supervisor for dispatcher in gateway.fleet.dispatchers.values()]
    serving = [supervisor for supervisor in supervisors if supervisor.engine.base_model == model]
    if not serving:
        served = ", ".join(gateway.fleet.base_models())
        raise NotFound(f"base model {model!r} is not served here; available: {served}", param="model")
    for supervisor in serving:
        if supervisor.tokenizer_files is not None:
            return supervisor.tokenizer_files
    raise EngineUnavailable(f"the engine of {model} is {serving[0].described}")
