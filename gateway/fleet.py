"""All engines of this gateway: which one serves a base model, and handing it what was accepted."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from engines.interface import EngineInfo
from engines.operations import SampleRequest
from gateway.dispatch import Dispatcher
from gateway.dispatch.blame import Blame
from gateway.engine_settings import EngineSettings
from gateway.errors import NotFound
from gateway.replicas import HandOver, Replicas
from gateway.routing import Router, beginnings
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.records import Future, Run, Settled
from gateway.supervisor import EngineState, Supervisor

log = logging.getLogger(__name__)

_ECHO = 300
"""Characters of a sender's own words that an error repeats."""


class Needs(NamedTuple):
    """What an engine must be able to do to answer a sample."""

    rank: int = 0
    """Of its adapter; 0: it has none."""
    unembedding: bool = False
    """Whether the adapter changes the unembedding."""
    any_prompt_token: bool = False
    """Whether it asks for log-probs of tokens that stand neither in the prompt nor among the best ones."""

    @classmethod
    def of(cls, lora: Mapping[str, Any] | None, request: SampleRequest | None = None) -> Needs:
        """`lora` is the adapter's configuration as records keep it; None: the base model is sampled."""
        asked = request is not None and (
            request.target_prompt_tokens is not None or request.prompt_alternatives > 0
        )
        if lora is None:
            return cls(any_prompt_token=asked)
        return cls(int(lora["rank"]), bool(lora["train_unembed"]), asked)

    def met_by(self, info: EngineInfo) -> bool:
        """Whether an engine that is described by `info` can do it."""
        return (
            self.rank <= info.max_rank
            and (info.train_unembed or not self.unembedding)
            and (info.any_prompt_token or not self.any_prompt_token)
        )


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
        self.dispatchers: dict[str, Dispatcher] = {}
        """By the engines' names, every replica by itself."""
        self._drain_s = settings.drain_s
        self._drained: asyncio.Future[None] | None = None
        self._router = Router()

        def make(engine: EngineSettings, blame: Blame, hand_over: HandOver | None) -> Dispatcher:
            supervisor = Supervisor(engine, settings, store, self.holder)
            dispatcher = Dispatcher(
                supervisor, store, settings, on_opened, on_settled, on_lost, blame, hand_over
            )
            # Another dictionary: somebody may be walking through this one.
            self.dispatchers = {**self.dispatchers, engine.name: dispatcher}
            return dispatcher

        self.entries = {
            entry.name: Replicas(entry, settings, store, make, self._forget, on_opened)
            for entry in settings.engines
        }
        """By the names in the settings."""

    def _forget(self, ended: Dispatcher) -> None:
        self.dispatchers = {
            name: dispatcher for name, dispatcher in self.dispatchers.items() if dispatcher is not ended
        }

    def start(self) -> None:
        """Start every engine; call it in the running loop."""
        for replicas in self.entries.values():
            replicas.start()

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
        await asyncio.gather(*(replicas.stop_tending() for replicas in self.entries.values()))
        await _all(dispatcher.drain(deadline) for dispatcher in self.dispatchers.values())
        await _all(dispatcher.supervisor.stop(deadline) for dispatcher in self.dispatchers.values())

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
        serving = self._serving(base_model, role)
        if serving:
            return serving[0]
        engines = [dispatcher.supervisor.engine for dispatcher in self.dispatchers.values()]
        served = (
            ", ".join(dict.fromkeys(engine.base_model for engine in engines if role in engine.roles))
            or "none"
        )
        verb = "trained" if role == "train" else "sampled"
        raise NotFound(
            f"base model {base_model[:_ECHO]!r} is not {verb} here; available: {served}",
            param=param,
        )

    def to_sample(self, base_model: str, needs: Needs, *, param: str = "base_model") -> Dispatcher:
        """The first of the engines that answer such samples. Raises NotFound naming what is served."""
        return self._able_to_sample(base_model, needs, param)[0]

    def route(
        self,
        base_model: str,
        needs: Needs,
        request: SampleRequest | None = None,
        *,
        here: bool = False,
        param: str = "base_model",
    ) -> Dispatcher:
        """The engine that answers one sample: of those that can, one that is ready, one of this gateway if that is
        preferred (`here`), then by prompt and load. Raises NotFound naming what is served."""
        candidates = self._able_to_sample(base_model, needs, param)
        candidates = [each for each in candidates if each.ready] or candidates
        if here:
            candidates = [each for each in candidates if each.supervisor.holding] or candidates
        if len(candidates) == 1 or request is None:
            return candidates[0]
        loads = {each.name: each.load for each in candidates}
        return self.dispatchers[self._router.choose(loads, beginnings(request))]

    def _able_to_sample(self, base_model: str, needs: Needs, param: str) -> list[Dispatcher]:
        """Those that do not train where that is possible, so that training goes on. If none can, the first one, which
        refuses by name."""
        serving = self._serving(base_model, "sample")
        able = [dispatcher for dispatcher in serving if _able(dispatcher.supervisor, needs)]
        beside = [dispatcher for dispatcher in able if "train" not in dispatcher.supervisor.engine.roles]
        return beside or able or [self.for_base_model(base_model, "sample", param=param)]

    def _serving(self, base_model: str, role: Literal["train", "sample"]) -> list[Dispatcher]:
        """In the order of the settings; replicas that are ending take nothing new."""
        return [
            dispatcher
            for replicas in self.entries.values()
            if replicas.entry.base_model == base_model and role in replicas.entry.roles
            for _, dispatcher in sorted(replicas.active.items())
        ]


async def _all(ends: Iterable[Awaitable[None]]) -> None:
    """Those of all engines: one that fails must not keep the others, and the gateway, from ending."""
    for failure in await asyncio.gather(*ends, return_exceptions=True):
        if isinstance(failure, Exception):
            log.error("unexpected error while an engine was ended", exc_info=failure)


def _able(supervisor: Supervisor, needs: Needs) -> bool:
    """Whether an engine can answer. One that has not been ready yet is taken to sample every adapter of its own model
    if it trains, else all but what samplers commonly cannot; one that cannot load its model answers nothing."""
    if supervisor.wherever in (EngineState.FAILED, EngineState.FAILING):
        return False
    if supervisor.info is not None:
        return needs.met_by(supervisor.info)
    return "train" in supervisor.engine.roles or not (needs.unembedding or needs.any_prompt_token)


def _holder(settings: Settings) -> str:
    """This process, as a lease's holder. With the embedded database, whose folder is locked, there is no other one, so
    a lease that a killed predecessor left need not run out first."""
    if settings.embedded:
        return "the only one"
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
