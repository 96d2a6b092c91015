"""Whose things a caller may list and see, and the parameters that all lists have."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from gateway.auth import Caller
from gateway.errors import Forbidden

Limit = Annotated[int, Query(ge=1, le=1000, description="rows in a page")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before", max_length=1000)]
Filter = Annotated[str | None, Query(max_length=300)]
OwnerFilter = Annotated[str | None, Query(max_length=300, description="for admins; others see their own")]


def scope(caller: Caller, owner: str | None) -> str | None:
    """Whose things to list; None: everybody's. Raises Forbidden."""
    if caller.admin:
        return owner
    if owner is not None and owner != caller.owner:
        raise Forbidden(f"only an admin's key can list what belongs to {owner!r}", param="owner")
    return caller.owner


def visible(caller: Caller, owner: str) -> bool:
    """Whether a caller may see what belongs to an owner."""
    return caller.admin or caller.owner == owner
