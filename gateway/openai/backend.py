"""What this dialect needs from the rest of the gateway, and nothing else of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec
from fastapi import Request

from engines.interface import EngineInfo
from engines.messages import SampleDelta
from engines.operations import AdapterRef, SampleRequest, SampleResult
from gateway.openai.passing_on import Passage
from gateway.text import TextCodec

SampleEvent = SampleDelta | SampleResult


class ServedModel(msgspec.Struct, frozen=True):
    """A base model that can be sampled. `created` is in Unix seconds; `max_context`, in tokens, is known once its
    engine has been ready."""

    name: str
    created: int
    ready: bool
    max_context: int | None = None


@dataclass(frozen=True)
class Target:
    """What a model name stands for: a base model with at most one adapter, its text, and who computes it for whom."""

    owner: str
    base_model: str
    adapter: AdapterRef | None
    text: TextCodec
    info: EngineInfo
    engine: Any
    """The backend's own; this dialect only hands it back."""
    at: str | None = None
    """The address of the gateway that has the engine; None: it is here."""


class Backend(Protocol):
    """Models by name, and samples. Owners are who an API key stands for."""

    @property
    def passage(self) -> Passage:
        """The way to other gateways."""

    async def models(self, owner: str) -> list[ServedModel]:
        """The base models that this owner may sample, also those whose engine is not ready."""

    async def resolve(self, owner: str, model: str) -> Target:
        """What to sample for a base model's name or a `tinker://…` path.

        Raises NotFound for an unknown name or somebody else's path, EngineUnavailable when its engine is not ready.
        """

    def sample(
        self, target: Target, request: SampleRequest, *, stream: bool
    ) -> AsyncGenerator[SampleEvent, None]:
        """The deltas as they come, when `stream` is set, and then the whole result.

        Closing the generator cancels the sample. Raises UserError for what the engine refuses, EngineUnavailable,
        EngineLost when an engine has died and what is drawn again does not continue what has come, or
        EngineDiedOverIt.
        """


def backend_of(request: Request) -> Backend:
    """The application's backend, which it keeps in `app.state.backend`."""
    return cast(Backend, request.app.state.backend)
