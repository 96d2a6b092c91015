"""Waiting for what becomes of calls."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from gateway.tinker.schemas.fields import Id, Lenient, SeqId
from gateway.tinker.texts import require_storable


class CancelFuture(Lenient):
    request_id: Id

    def __post_init__(self) -> None:
        require_storable("request_id", self.request_id)


class FuturesTarget(Lenient):
    """The samples of one client of a sampler."""

    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Meta(ge=0, lt=2**33)] | None = None
    type: Literal["sampling_session"] | None = None


class RetrieveFutures(Lenient):
    target: FuturesTarget
    prev_cursor: SeqId | None = None
    timeout: Annotated[float, Meta(ge=0)] | None = None
    retrieved_request_ids: Annotated[list[Id], Meta(max_length=100_000)] | None = None


class RetrieveFuture(Lenient):
    request_id: Id
    allow_metadata_only: bool | None = None

    def __post_init__(self) -> None:
        require_storable("request_id", self.request_id)
