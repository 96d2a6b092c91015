"""What the routes work with: one object that the application keeps, reached by one dependency."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar, cast

from fastapi import Depends, Request

from gateway.auth import Keys
from gateway.checkpoints import FolderRemovals
from gateway.completions import Completions
from gateway.dispatch import Dispatcher
from gateway.duties import Duties
from gateway.errors import Gone, NotFound
from gateway.fleet import Fleet
from gateway.futures import Futures
from gateway.notices import Notices
from gateway.settings import Settings
from gateway.signed_urls import SignedUrls
from gateway.store import Store
from gateway.store.records import Run, RunStatus, Sampler, Session, StoredLoss
from gateway.turns import Turns

T = TypeVar("T")

_LOSSES_IN_MEMORY = 100
"""Each takes up to 1 MiB."""
_IMPORTS_AT_A_TIME = 2


class Remembered(Generic[T]):
    """Records by id whose owner, engine and model never change, so that one look into the database is enough.

    Those whose other fields change (a session's end, a run's, a sampler's release) are looked up each time while
    `shared` says that there are other gateways, which may change them.
    """

    def __init__(
        self,
        look_up: Callable[[str], Awaitable[T | None]],
        largest: int = 10_000,
        shared: Callable[[], bool] | None = None,
    ) -> None:
        self._look_up = look_up
        self._shared = shared
        self._largest = largest
        self._records: OrderedDict[str, T] = OrderedDict()
        self._forgotten = 0

    async def get(self, key: str) -> T | None:
        """The record, from memory or from the database."""
        if "\0" in key:
            return None  # no id has one, and PostgreSQL does not take it as text
        record = self._records.get(key)
        if record is None or (self._shared is not None and self._shared()):
            forgotten = self._forgotten
            record = await self._look_up(key)
            # One that was read while something changed may be as it was before: it is not kept.
            if record is not None and forgotten == self._forgotten:
                self._records[key] = record
                if len(self._records) > self._largest:
                    self._records.popitem(last=False)
        return record

    def forget(self, key: str) -> None:
        """Something of the record has changed."""
        self._forgotten += 1
        self._records.pop(key, None)


@dataclass(frozen=True, slots=True)
class Gateway:
    """The running parts of one gateway process."""

    settings: Settings
    store: Store
    futures: Futures
    completions: Completions
    fleet: Fleet
    keys: Keys
    removals: FolderRemovals
    signed_urls: SignedUrls
    duties: Duties
    notices: Notices
    importing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_IMPORTS_AT_A_TIME))
    started_at: float = field(default_factory=time.time)
    turns: Turns = field(init=False)
    known_sessions: Remembered[Session] = field(init=False)
    known_runs: Remembered[Run] = field(init=False)
    known_samplers: Remembered[Sampler] = field(init=False)
    known_losses: Remembered[StoredLoss] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", Turns(self.store))
        shared = self.notices.others_known
        object.__setattr__(self, "known_sessions", Remembered(self.store.sessions.get, shared=shared))
        object.__setattr__(self, "known_runs", Remembered(self.store.runs.get, shared=shared))
        object.__setattr__(self, "known_samplers", Remembered(self.store.samplers.get, shared=shared))
        losses = Remembered(self.store.custom_losses.get, _LOSSES_IN_MEMORY)
        object.__setattr__(self, "known_losses", losses)

    async def session(self, owner: str, session_id: str) -> Session:
        """An owner's session. Raises NotFound."""
        session = await self.known_sessions.get(session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"there is no session {session_id!r}", param="session_id")
        return session

    async def live_session(self, owner: str, session_id: str) -> Session:
        """An owner's session that is not finished. Raises NotFound and Gone."""
        session = await self.session(owner, session_id)
        if session.finished_at is not None:
            raise _over(session)
        return session

    async def heard_of(self, owner: str, session_id: str) -> None:
        """The client of a session is alive. Raises NotFound, and Gone, also when another gateway has ended it."""
        session = await self.live_session(owner, session_id)
        if not await self.store.sessions.beat(session_id):
            self.known_sessions.forget(session_id)
            raise _over(session)

    async def run(self, owner: str, run_id: str) -> Run:
        """An owner's run. Raises NotFound."""
        run = await self.known_runs.get(run_id)
        if run is None or run.owner != owner:
            raise NotFound(f"there is no run {run_id!r}", param="model_id")
        return run

    async def live_run(self, owner: str, run_id: str) -> Run:
        """An owner's run that takes operations. Raises NotFound and Gone."""
        run = await self.run(owner, run_id)
        if run.status is RunStatus.UNLOADED:
            raise Gone(
                f"run {run_id} has been unloaded; begin a new one from a checkpoint of it", param="model_id"
            )
        if run.status is RunStatus.STORAGE:
            raise Gone(
                f"run {run_id} only holds a checkpoint that was copied or imported; begin a new one at that",
                param="model_id",
            )
        return run

    def dispatcher_of(self, run: Run) -> Dispatcher:
        """Whoever feeds a run's engine. Raises NotFound when the settings do not have that engine any more."""
        dispatcher = self.fleet.dispatchers.get(run.engine)
        if dispatcher is None:
            raise NotFound(
                f"run {run.run_id} was made on the engine {run.engine!r}, which this gateway's settings do not have; "
                f"there are {', '.join(self.fleet.dispatchers)}",
                param="model_id",
            )
        return dispatcher

    async def lora_of(self, run_id: str | None) -> dict[str, Any] | None:
        """The adapter's configuration of whatever was saved from a run; None: there is no adapter."""
        run = await self.known_runs.get(run_id) if run_id is not None else None
        return run.lora if run is not None else None

    async def sampler(self, owner: str, sampler_id: str) -> Sampler:
        """An owner's sampler. Raises NotFound."""
        sampler = await self.known_samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise NotFound(f"there is no sampling session {sampler_id!r}", param="sampling_session_id")
        return sampler


def _over(session: Session) -> Gone:
    return Gone(
        f"session {session.session_id} has ended: its client finished it or was not heard of for long; create a new "
        "one",
        param="session_id",
    )


def gateway_of(request: Request) -> Gateway:
    """The running gateway."""
    return cast(Gateway, request.app.state.gateway)


async def running_gateway_of(request: Request) -> Gateway:
    """Dependency: the running gateway. Asynchronous, for others are called in a worker thread."""
    return gateway_of(request)


Running = Annotated[Gateway, Depends(running_gateway_of)]
"""Parameter of a route: the running gateway."""
