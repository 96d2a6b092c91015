"""The lane of the samples: no order among them, owners in turn, repeated when the engine dies."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

from engines.interface import UserError
from gateway.dispatch.blame import Blame
from gateway.dispatch.claiming import Interrupted, claimed_inputs, sent
from gateway.dispatch.inputs import RecentInputs
from gateway.dispatch.outcomes import failed
from gateway.dispatch.quarantine import Quarantine
from gateway.dispatch.room import QueuedBytes, require_room, samples_load
from gateway.dispatch.run_queue import Turns
from gateway.dispatch.standing import Standing
from gateway.engine_process import Drawn, EngineProcess
from gateway.errors import EngineFailed, EngineLost
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.futures import Claim
from gateway.store.records import Future, Outcome, Settled, Usage
from gateway.store.usage import session_of_id

log = logging.getLogger(__name__)


GIVEN_UP = "the sample was cancelled by its client"


class _Active(NamedTuple):
    """A sample in the engine."""

    owner: str
    task: asyncio.Task[None]


class SamplingLane:
    """The samples of one engine: most wait here, some are in the engine's batch."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        on_settled: Callable[[Settled | None], None],
        blame: Blame,
    ) -> None:
        self._store = store
        self._blame = blame
        self._settings = settings
        self._on_settled = on_settled
        self._waiting: dict[str, Future] = {}
        self._turns = Turns()
        self.queued = QueuedBytes()
        self._inputs = RecentInputs(settings.input_cache_bytes)
        self._active: dict[str, _Active] = {}
        self._given_up: set[str] = set()
        self._claiming: set[str] = set()
        self._withdrawn: set[str] = set()
        self._broken: BaseException | None = None
        self._closed = False
        self.epoch: int | None = None
        """That of the engine, which decides whether what is settled here counts."""
        self._wake = asyncio.Event()
        self.in_engine: set[str] = set()

    def accept(self, future: Future, body: bytes | None = None) -> None:
        """Queue a sample that has become durable; `body` is its input where that is at hand."""
        if future.open and future.request_id in self._given_up:
            self._settle_given_up(future)
        elif future.open:
            if body is not None:
                self._inputs.add(future.request_id, body)
            self.queued.add(future)
            self._waiting[future.request_id] = future
            self._turns.add(future.owner, future.request_id)
            self._wake.set()

    async def reset(self) -> None:
        """Forget everything and cancel what is under way."""
        await self.cancel()
        self._waiting.clear()
        self._turns = Turns()
        self.queued.clear()
        self._inputs.clear()
        self._claiming.clear()
        self._broken = None
        self.in_engine.clear()

    def close(self) -> None:
        """Begin nothing any more; `feed` ends when nothing is under way."""
        self._closed = True
        self._wake.set()

    async def cancel(self) -> None:
        """Leave what is under way; it stays open in the database."""
        tasks = [active.task for active in self._active.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def give_up(self, future: Future) -> None:
        """Nobody wants this sample any more: it fails, and what it occupies in the engine is freed."""
        self._given_up.add(future.request_id)
        active = self._active.get(future.request_id)
        waiting = self._waiting.pop(future.request_id, None)
        if active is not None:
            active.task.cancel()
        elif waiting is not None:
            self._turns.remove(waiting.owner, waiting.request_id)
            self._inputs.discard(waiting.request_id)
            self._settle_given_up(waiting)
        # else it is being claimed, or is read from the database when the engine is there: it is failed then

    def withdraw(self, request_ids: Collection[str]) -> None:
        """Another gateway has settled these: they wait no longer, and what they occupy in the engine is freed."""
        for request_id in request_ids:
            self.queued.remove(request_id)
            if (waiting := self._waiting.pop(request_id, None)) is not None:
                self._turns.remove(waiting.owner, request_id)
                self._inputs.discard(request_id)
            elif (active := self._active.get(request_id)) is not None:
                active.task.cancel()
            elif request_id in self._claiming:  # the news has overtaken the claim's answer
                self._withdrawn.add(request_id)

    @property
    def open(self) -> int:
        """How many samples wait here or are in the engine."""
        return len(self._waiting) + len(self._active)

    @property
    def waiting(self) -> int:
        """How many of them the engine has not been given."""
        return len(self._waiting)

    def take(self, count: int) -> list[tuple[Future, bytes | None]]:
        """Some of those that wait, owners in turn, with their inputs where they are at hand. They are not here any more
        then: somebody else is to draw them."""
        taken: list[tuple[Future, bytes | None]] = []
        while len(taken) < count and (request_id := self._turns.take()) is not None:
            taken.append((self._waiting.pop(request_id), self._inputs.discard(request_id)))
            self.queued.remove(request_id)
        return taken

    def was_given_up(self, request_id: str) -> bool:
        """Whether a sample has been given up that is not here; this is forgotten then."""
        given_up = request_id in self._given_up
        self._given_up.discard(request_id)
        return given_up

    def standing(self, future: Future) -> Standing:
        """Where an open sample stands."""
        if future.request_id in self._active:
            return Standing(False, "it is being drawn")
        before = self._turns.before(future.owner, future.request_id)
        return Standing(
            True,
            f"{before} samples of yours come before it; the engine draws {len(self._active)} and takes at most "
            f"{self._settings.samples_in_engine} at a time",
        )

    def require_room(self, owner: str) -> None:
        """Raises TooManyRequests when an owner's queue is full."""
        require_room([samples_load(self._turns.count(owner), self._settings)], lambda: False)

    async def feed(self, engine: EngineProcess, quarantine: Quarantine) -> None:
        """Until the lane is closed and empty. Raises EngineLost, and Interrupted when a write fails."""
        while not (self._closed and not self._active):
            await self._wake.wait()
            self._wake.clear()
            if engine.lost.done():
                raise EngineLost(engine.lost.result())
            if self._broken is not None:
                raise Interrupted(f"a sample's outcome could not be stored: {self._broken}")
            for future, body in await self._claim(engine, quarantine):
                if future.request_id in self._withdrawn:
                    quarantine.leave()
                    continue
                if future.request_id in self._given_up:
                    quarantine.leave()
                    self._settle_given_up(future)
                    continue
                task = asyncio.create_task(self._sample(engine, future, body))
                self._active[future.request_id] = _Active(future.owner, task)
                task.add_done_callback(lambda _: quarantine.leave())
                task.add_done_callback(functools.partial(self._done, future))

    async def _claim(self, engine: EngineProcess, quarantine: Quarantine) -> list[tuple[Future, bytes]]:
        """As many samples as there is room for in the engine, owners in turn."""
        batch = [] if self._closed else self._take_batch()
        if not batch:
            return []
        await quarantine.enter(alone=self._blame.suspected(batch[0]), count=len(batch))
        epoch = engine.config.epoch
        claim = Claim(tuple(future.request_id for future in batch), epoch, engine.config.name)
        self._claiming, self._withdrawn = set(claim.request_ids), set()
        inputs = await claimed_inputs(self._store.futures, self._inputs, claim, self._written)
        quarantine.leave(count=len(batch) - len(inputs))
        for future in batch:
            if future.request_id not in inputs:
                self.queued.remove(future.request_id)  # it has its outcome already
        claimed = [sent(future, epoch) for future in batch]
        return [(future, inputs[future.request_id]) for future in claimed if future.request_id in inputs]

    def _take_batch(self) -> list[Future]:
        """Owners in turn while there is room; beyond it, one for each owner who has nothing in the engine."""
        room = self._settings.samples_in_engine - len(self._active)
        batch: list[Future] = []
        served = {active.owner for active in self._active.values()}
        while (request_id := self._next(room - len(batch), served)) is not None:
            future = self._waiting[request_id]
            served.add(future.owner)
            if self._blame.suspected(future) and batch:
                self._turns.put_back(future.owner, request_id)  # next, and alone
                break
            batch.append(self._waiting.pop(request_id))
            if self._blame.suspected(future):
                break
        return batch

    def _next(self, room: int, served: set[str]) -> str | None:
        if room > 0:
            return self._turns.take()
        newcomer = next((owner for owner in self._turns.owners() if owner not in served), None)
        return self._turns.take(newcomer) if newcomer is not None else None

    async def _sample(self, engine: EngineProcess, future: Future, body: bytes) -> None:
        self.in_engine.add(future.request_id)
        outcome = self._blame.worn_out(future) or await self._outcome(engine, future, body)
        if outcome is not None:
            self.in_engine.discard(future.request_id)
            await self._store.futures.settle(outcome, self._on_settled)
            self.queued.remove(future.request_id)

    async def _outcome(self, engine: EngineProcess, future: Future, body: bytes) -> Outcome | None:
        try:
            [result] = [item async for item in engine.sample(body, future.owner)]
        except UserError as error:
            return failed(future, "user", str(error))
        except EngineFailed as error:
            return failed(future, "server", error.message, error.error_id)
        except EngineLost:
            return None  # still open in the database: it is read again and repeated
        assert isinstance(result, Drawn)
        usage = Usage(
            future.owner,
            session_of_id(future.sampler_id or ""),
            engine.config.base_model,
            prefill_tokens=result.prompt_tokens - result.cached_tokens,
            cached_tokens=result.cached_tokens,
            sampled_tokens=result.sampled_tokens,
        )
        return Outcome(future, result=result.body, usage=usage)

    def _done(self, future: Future, task: asyncio.Task[None]) -> None:
        self._active.pop(future.request_id, None)
        if task.cancelled():
            self.in_engine.discard(future.request_id)
            if future.request_id in self._given_up:
                self._settle_given_up(future)
        self._given_up.discard(future.request_id)
        self._written(task)
        self._wake.set()

    def _settle_given_up(self, future: Future) -> None:
        """If its result is being stored already, that comes first, and this changes nothing."""
        self._given_up.discard(future.request_id)
        self.in_engine.discard(future.request_id)
        outcome = replace(failed(future, "user", GIVEN_UP), fence=self.epoch)
        self._store.futures.settle(outcome, self._on_settled).add_done_callback(self._written)
        self.queued.remove(future.request_id)

    def _written(self, write: asyncio.Future[Any]) -> None:
        if not write.cancelled() and write.exception() is not None:
            self._broken = write.exception()
            self._wake.set()
