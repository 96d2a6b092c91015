"""Sessions, and what else a client says of itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.tinker.schemas.fields import Id, Lenient, Text, UserMetadata
from gateway.tinker.texts import require_storable


class ClientConfig(Lenient):
    sdk_version: str | None = None


class CreateSession(Lenient):
    tags: list[Text] | None = None
    user_metadata: UserMetadata | None = None
    sdk_version: Text | None = None
    project_id: Text | None = None
    display_name: Text | None = None

    def __post_init__(self) -> None:
        for field in ("tags", "user_metadata", "sdk_version", "project_id", "display_name"):
            require_storable(field, getattr(self, field))


class SessionHeartbeat(Lenient):
    session_id: Id


class FinishReason(Lenient):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Lenient):
    reason: FinishReason | None = None
    detail: Text | None = None

    def __post_init__(self) -> None:
        require_storable("detail", self.detail)


class AssignProject(Lenient):
    project_id: Annotated[str, Meta(min_length=1, max_length=1_000)]

    def __post_init__(self) -> None:
        require_storable("project_id", self.project_id)


class Telemetry(Lenient):
    """Accepted and not kept: its events can hold keys and prompts."""

    events: list[Any] = msgspec.field(default_factory=list)
