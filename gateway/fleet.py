"""All engines of this gateway: which one serves a base model, and handing it what was accepted."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from typing import Literal

from gateway.dispatch import Dispatcher
from gateway.errors import NotFound
from gateway.settings import EngineSettings, Settings
from gateway.store import Store
from gateway.store.records import Future, Run, Settled
from gateway.supervisor import Supervisor

_ECHO = 300
"""Characters of a sender's own words that an error repeats."""


class Fleet:
    """The engines of the settings, each with its supervisor and dispatcher."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        on_opened: Callable[[Future], None],
        on_settled: Callable[[Settled | None], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.holder = _holder(settings)
        """This process, as leases name it."""
        self._drain_s = settings.drain_s
        self._drained: asyncio.Future[None] | None = None
        self.dispatchers: dict[str, Dispatcher] = {}
        for engine in settings.engines:
            supervisor = Supervisor(engine, settings, store, self.holder)
            self.dispatchers[engine.name] = Dispatcher(
                supervisor, store, settings, on_opened, on_settled, on_lost
            )

    def start(self) -> None:
        """Start every engine; call it in the running loop."""
        for dispatcher in self.dispatchers.values():
            dispatcher.supervisor.start()
            dispatcher.start()

    async def drain(self) -> None:
        """Finish what is at hand and begin nothing, within `drain_s`; then stop the processes and give the leases back.

        What is open stays in the database. More than once is no error.
        """
        if self._drained is None:
            self._drained = asyncio.ensure_future(self._drain())
        await asyncio.shield(self._drained)

    @property
    def draining(self) -> bool:
        """Whether the end of this gateway has begun."""
        return self._drained is not None

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_s
        await asyncio.gather(*(dispatcher.drain(deadline) for dispatcher in self.dispatchers.values()))
        await asyncio.gather(*(each.supervisor.stop(deadline) for each in self.dispatchers.values()))

    def accept(self, future: Future, body: bytes | None) -> None:
        """A future has become durable; `body` is its input where that is at hand."""
        dispatcher = self.dispatchers.get(future.engine)
        if dispatcher is not None:
            dispatcher.accept(future, body)

    def holds(self, engine: str) -> bool:
        """Whether this process dispatches for an engine."""
        dispatcher = self.dispatchers.get(engine)
        return dispatcher is not None and dispatcher.supervisor.holding

    async def give_up(self, future: Future) -> None:
        """A sample is not wanted any more."""
        dispatcher = self.dispatchers.get(future.engine)
        if dispatcher is not None:
            await dispatcher.give_up(future)

    async def drop_run(self, run: Run) -> None:
        """Free a run's memory, if its engine is still one of ours."""
        dispatcher = self.dispatchers.get(run.engine)
        if dispatcher is not None:
            await dispatcher.drop(run.run_id)

    def base_models(self) -> list[str]:
        """Names of the base models that are served."""
        return list(dict.fromkeys(d.supervisor.engine.base_model for d in self.dispatchers.values()))

    def for_base_model(
        self, base_model: str, role: Literal["train", "sample"], *, param: str = "base_model"
    ) -> Dispatcher:
        """The engine that trains or samples a base model. Raises NotFound naming what is served."""
        for dispatcher in self.dispatchers.values():
            engine: EngineSettings = dispatcher.supervisor.engine
            if engine.base_model == base_model and role in engine.roles:
                return dispatcher
        engines = [dispatcher.supervisor.engine for dispatcher in self.dispatchers.values()]
        served = ", ".join(engine.base_model for engine in engines if role in engine.roles) or "none"
        verb = "trained" if role == "train" else "sampled"
        raise NotFound(
            f"base model {base_model[:_ECHO]!r} is not {verb} here; available: {served}",
            param=param,
        )


def _holder(settings: Settings) -> str:
    """This process, as a lease's holder. With the embedded database, whose folder is locked, there is no other one, so
    a lease that a killed predecessor left need not run out first."""
    if settings.embedded:
        return "the only one"
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
