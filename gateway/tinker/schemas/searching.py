"""Searching sessions."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta

from gateway.tinker.schemas.fields import Id, Strict, Text, TextMetadata
from gateway.tinker.texts import require_storable


class SearchOwner(Strict):
    """`type` is own, accessible or user; the last with the owners' URNs."""

    owner_urns: Annotated[list[Text], Meta(min_length=1, max_length=10)] | None = None

    def __post_init__(self) -> None:
        if self.owner_urns is not None and self.type != "user":
            raise ValueError("owner_urns belong to the type user")


class StatusQuery(Strict):
    """`type` is active, client_finished, cancelled or failed."""

    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if self.reasons is not None and self.type != "client_finished":
            raise ValueError("reasons belong to the type client_finished")


class SearchCursor(Strict):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: Id


class SearchSessions(Strict):
    session_id: Id | None = None
    project_ids: list[Text] | None = None
    user_metadata: TextMetadata | None = None
    display_name: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    owner: SearchOwner | None = None
    statuses: Annotated[list[StatusQuery], Meta(min_length=1, max_length=20)] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] | None = None
    cursor: SearchCursor | None = None

    def __post_init__(self) -> None:
        for field in ("session_id", "project_ids", "user_metadata", "display_name"):
            require_storable(field, getattr(self, field))
