"""Models by name and samples from the fleet, as the OpenAI routes need them. Nothing of this is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from engines.messages import SampleDelta
from engines.operations import AdapterRef, SampleRequest, SampleResult, decode_result
from gateway.checkpoints import SCHEME, loadable_checkpoint
from gateway.engine_process import Drawn
from gateway.errors import EngineElsewhere, EngineUnavailable
from gateway.fleet import Needs
from gateway.openai import Passage, ServedModel, Target
from gateway.state import Gateway
from gateway.store.records import Usage
from gateway.supervisor import EngineState, Supervisor
from gateway.unstored import Asked, Unstored


class FleetBackend:
    """The fleet behind the OpenAI routes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started_at = int(gateway.started_at)
        self._rooms: dict[str, asyncio.Semaphore] = {}
        self._unstored = Unstored(gateway.fleet, gateway.settings)
        self.passage = Passage()

    async def close(self) -> None:
        """Close the connections to other gateways."""
        await self.passage.close()

    async def models(self, owner: str) -> list[ServedModel]:
        """Every base model that can be sampled; the same for all owners."""
        served: dict[str, ServedModel] = {}
        for dispatcher in self._gateway.fleet.dispatchers.values():
            supervisor = dispatcher.supervisor
            if "sample" in supervisor.engine.roles:
                context = supervisor.info.max_context if supervisor.info is not None else None
                ready = supervisor.wherever is EngineState.READY
                name = supervisor.engine.base_model
                if ready or name not in served:
                    served[name] = ServedModel(name, self._started_at, ready, context)
        return list(served.values())

    async def resolve(self, owner: str, model: str) -> Target:
        """A base model, or a checkpoint of the owner's (or a public one) on its base model."""
        base_model, adapter, lora = model, None, None
        if model.startswith(SCHEME):
            checkpoint = await loadable_checkpoint(self._gateway.store, owner, model, param="model")
            base_model, adapter = checkpoint.base_model, AdapterRef(checkpoint.folder, checkpoint.folder)
            lora = checkpoint.lora
        needs = Needs.of(lora)
        supervisor = self._gateway.fleet.route(base_model, needs, here=True, param="model").supervisor
        at = _place(supervisor)
        if supervisor.text is None or supervisor.info is None:
            raise EngineUnavailable(f"the engine of {base_model} is starting; try again in a moment")
        return Target(owner, base_model, adapter, supervisor.text, supervisor.info, needs, at)

    async def sample(
        self, target: Target, request: SampleRequest, *, stream: bool
    ) -> AsyncGenerator[SampleDelta | SampleResult, None]:
        """So many of an owner at a time; closing the generator cancels."""
        usage = Usage(target.owner, "", target.base_model)
        room = self._rooms.setdefault(
            target.owner, asyncio.Semaphore(self._gateway.settings.samples_in_engine)
        )
        asked = Asked(target.owner, target.base_model, cast(Needs, target.engine), request, stream)
        async with room:
            events = self._unstored.draw(asked)
            async with aclosing(events), aclosing(self._counted(usage, request, events)) as counted:
                async for event in counted:
                    yield event

    async def _counted(
        self, usage: Usage, request: SampleRequest, events: AsyncGenerator[SampleDelta | Drawn, None]
    ) -> AsyncGenerator[SampleDelta | SampleResult, None]:
        """The events as they come; what they have used is written down, also of a stream that its client has left."""
        try:
            async for event in events:
                usage = _used(usage, request, event)
                yield event if isinstance(event, SampleDelta) else _result(event)
        finally:
            self._gateway.store.usage.add_behind(usage)


def _place(supervisor: Supervisor) -> str | None:
    """Where its engine is: the address of another gateway that has it ready, or None, which is here, where it is waited
    for if it has died. Raises what `now` raises."""
    if supervisor.coming_back:
        return None
    try:
        supervisor.now()
    except EngineElsewhere as elsewhere:
        if not elsewhere.url:
            raise
        return elsewhere.url
    return None


def _used(usage: Usage, request: SampleRequest, event: SampleDelta | Drawn) -> Usage:
    """What has been used when an event has come: the deltas so far, or the engine's own count at the end."""
    if isinstance(event, SampleDelta):
        sampled = usage.sampled_tokens + len(event.tokens)
        return replace(usage, prefill_tokens=request.prompt.shape[0], sampled_tokens=sampled)
    return replace(
        usage,
        prefill_tokens=event.prompt_tokens - event.cached_tokens,
        cached_tokens=event.cached_tokens,
        sampled_tokens=event.sampled_tokens,
    )


def _result(drawn: Drawn) -> SampleResult:
    result = decode_result(drawn.body)
    assert isinstance(result, SampleResult)
    return result
