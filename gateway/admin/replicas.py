"""How many replicas an engine has: shown to all, set by admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from gateway.auth import Caller, Who
from gateway.errors import BadRequest, Forbidden, NotFound
from gateway.queries import KnownQueryRoute
from gateway.replica_bounds import LARGEST, ReplicaBounds, problem_of
from gateway.replicas import Replicas
from gateway.state import Gateway, Running

router = APIRouter(prefix="/admin/v1", tags=["admin"], route_class=KnownQueryRoute)


class ReplicasView(BaseModel):
    """The replicas of one engine of the settings."""

    engine: str
    min: Annotated[int, Field(description="there are at least so many")]
    max: Annotated[int, Field(description="and at most so many")]
    wanted: Annotated[int, Field(description="there are to be so many now")]
    replicas: Annotated[list[str], Field(description="names of those that take samples, or will when loaded")]
    set_by_admin: Annotated[bool, Field(description="whether the bounds are an admin's, not the settings'")]


class WantedBounds(BaseModel):
    """Bounds of the number of replicas; equal ones fix it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    min: int = Field(ge=1, le=LARGEST)
    max: int = Field(ge=1, le=LARGEST)


@router.get("/engines/{name}/replicas")
async def get_replicas(name: str, caller: Who, gateway: Running) -> ReplicasView:
    """How many replicas an engine has, and its bounds."""
    return _view(_replicas(gateway, name))


@router.put("/engines/{name}/replicas")
async def set_replicas(name: str, wanted: WantedBounds, caller: Who, gateway: Running) -> ReplicasView:
    """Other bounds than the settings', for all gateways, also after a restart; for admins. Replicas that are too many
    end when they have drawn what they are drawing."""
    _require_admin(caller)
    replicas = _replicas(gateway, name)
    entry = replicas.entry
    bounds = ReplicaBounds(wanted.min, wanted.max)
    if (problem := problem_of(bounds, entry.devices, trains="train" in entry.roles)) is not None:
        raise BadRequest(f"replicas of {name!r}: {problem}", param="max")
    await replicas.set_bounds(wanted.min, wanted.max)
    return _view(replicas)


@router.delete("/engines/{name}/replicas")
async def reset_replicas(name: str, caller: Who, gateway: Running) -> ReplicasView:
    """The settings' bounds again; for admins."""
    _require_admin(caller)
    replicas = _replicas(gateway, name)
    await replicas.set_bounds(None, None)
    return _view(replicas)


def _require_admin(caller: Caller) -> None:
    if not caller.admin:
        raise Forbidden("how many replicas there are is decided with an admin's key only")


def _replicas(gateway: Gateway, name: str) -> Replicas:
    replicas = gateway.fleet.entries.get(name)
    if replicas is None:
        raise NotFound(
            f"the settings have no engine {name!r}; they have {', '.join(gateway.fleet.entries)}",
            param="name",
        )
    return replicas


def _view(replicas: Replicas) -> ReplicasView:
    return ReplicasView(
        engine=replicas.entry.name,
        min=replicas.bounds.min,
        max=replicas.bounds.max,
        wanted=replicas.wanted,
        replicas=[dispatcher.name for _, dispatcher in sorted(replicas.active.items())],
        set_by_admin=replicas.bounds != replicas.entry.bounds,
    )
