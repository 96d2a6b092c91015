"""Feeds one engine, in two lanes side by side: the runs' operations and the samples.

The database is the truth. Whenever something unexpected happens (the engine dies, the database does not answer, an
outcome is refused because its epoch is over), everything in memory is forgotten and read again: what was not settled is
still open, and a run that the engine does not have is built again from its log before its next operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from gateway.dispatch.blame import Blame
from gateway.dispatch.claiming import Interrupted
from gateway.dispatch.elsewhere import QueuesElsewhere
from gateway.dispatch.quarantine import Quarantine
from gateway.dispatch.room import bytes_load, require_room
from gateway.dispatch.sampling import GIVEN_UP, SamplingLane
from gateway.dispatch.standing import Standing
from gateway.dispatch.training import TrainingLane
from gateway.engine_process import EngineProcess
from gateway.errors import EngineLost, StoreUnavailable
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.notices import Notice
from gateway.store.records import Future, Settled
from gateway.supervisor import EngineState, Supervisor
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

_PAUSE_S = 0.2
_LOOK_S = 0.02
_OWED_AT_A_TIME = 512
_HAND_OVER_S = 0.5
"""Seconds between offers of what an engine owes that is not ready."""
_LAST_WRITES_S = 1.0
"""Seconds for the last outcomes to be stored when the time to drain is over."""


class Dispatcher:
    """Feeds the engine of one supervisor, as long as this gateway has its lease. `on_opened` is told of open futures
    found in the database, `on_settled` of every outcome right after its commit, `on_lost` of the engine's name when
    another gateway has it. Replicas share the `blame`; while the engine is not ready, `hand_over` offers its samples to
    others."""

    def __init__(
        self,
        supervisor: Supervisor,
        store: Store,
        settings: Settings,
        on_opened: Callable[[Future], None],
        on_settled: Callable[[Settled | None], None],
        on_lost: Callable[[str], None],
        blame: Blame,
        hand_over: Callable[[Dispatcher], Awaitable[None]] | None = None,
    ) -> None:
        self.supervisor = supervisor
        self._blame = blame
        self._hand_over = hand_over
        self._expected = 0
        self.training = TrainingLane(store, settings, on_settled, self._blame)
        self.sampling = SamplingLane(store, settings, on_settled, self._blame)
        self._store = store
        self._settings = settings
        self._on_opened = on_opened
        self._on_settled = on_settled
        self._on_lost = on_lost
        self._elsewhere = QueuesElsewhere(store, settings, supervisor.engine.name)
        self._task: asyncio.Task[None] | None = None
        self._engine: EngineProcess | None = None
        self._died_over: list[str] = []
        self._reading = Trouble(log, f"engine {self.name}: is in step with the database again")
        self._read = False

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.supervisor.engine.name

    @property
    def ready(self) -> bool:
        """Whether samples that are handed to it are drawn at once, here or at the gateway that has its engine."""
        return self.supervisor.wherever is EngineState.READY

    @property
    def load(self) -> int:
        """How many samples it has, waiting or being drawn, as far as is known here."""
        known = self.sampling.open if self.supervisor.holding else self._elsewhere.samples
        return self._expected + known

    async def look(self) -> None:
        """Find out what it has to do, if another gateway keeps its queue."""
        if not self.supervisor.holding:
            await self._elsewhere.look()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """A sample is being drawn that no queue has, or comes into one soon."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    async def owed(self) -> list[Future]:
        """The samples of an engine that is not ready, as the database has them; here they are forgotten. None if
        another gateway has the lease."""
        await self._count_deaths()
        self._read = False
        await self.sampling.reset()
        if not self.supervisor.holding:
            return await self._store.replicas.orphans([self.name], _OWED_AT_A_TIME)
        owed = await self._store.futures.open_of_engine(self.name)
        return [future for future in owed if future.run_id is None]

    def standing(self, future: Future) -> Standing:
        """Where an open future of this engine stands."""
        supervisor = self.supervisor
        if supervisor.wherever is not EngineState.READY:
            return Standing(True, f"the engine of {supervisor.engine.base_model} is {supervisor.described}")
        if supervisor.state is not EngineState.READY:
            return Standing(False, "it is in line at the gateway that has its engine")
        lane = self.sampling if future.run_id is None else self.training
        return lane.standing(future)

    def start(self) -> None:
        """Start feeding; call it in the running loop."""
        self._task = asyncio.create_task(self._feed_forever(), name=f"dispatch-{self.name}")

    async def drain(self, deadline: float) -> None:
        """Begin nothing any more, wait until the loop's time `deadline` for what is in the engine, and store what has
        come out of it. What is under way then stays open in the database."""
        self.supervisor.close()
        self.training.close()
        self.sampling.close()
        if self._task is None:
            return
        engine = self._engine
        if engine is not None:
            await asyncio.wait({self._task}, timeout=_left(deadline))
            while engine.busy and _left(deadline):  # noqa: ASYNC110 - requests that are not stored tell nobody
                await asyncio.sleep(_LOOK_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.sampling.cancel()
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            await asyncio.wait_for(self._store.database.barrier(), max(_left(deadline), _LAST_WRITES_S))
        self.training.snapshots.reset()

    def accept(self, future: Future, body: bytes | None) -> None:
        """A future of this engine has become durable; `body` is its input where that is at hand.

        Without the lease it is left to the gateway that has it, or to what is read from the database with the lease.
        """
        if not self.supervisor.holding:
            return
        if future.run_id is None:
            self.sampling.accept(future, body)
        else:
            self.training.accept(future, body)

    def adopt(self, future: Future) -> None:
        """An open future that another gateway has accepted. While the engine is not ready, what it owes is not known
        here either; then this one is read with the others."""
        if self.supervisor.holding and self.supervisor.state is EngineState.READY:
            self._on_opened(future)
            self.accept(future, None)

    async def require_room(self, future: Future) -> None:
        """Raises TooManyRequests when a queue that a new future would wait in is full."""
        if not (self.supervisor.holding and self._read):
            await self._elsewhere.require_room(future)
            return
        waiting = self.training.queued.of(future.owner) + self.sampling.queued.of(future.owner)
        if future.run_id is None:
            require_room([bytes_load(waiting, self._settings)], lambda: False)
            self.sampling.require_room(future.owner)
        else:
            require_room([bytes_load(waiting, self._settings)], lambda: self.training.awaited(future))
            self.training.require_room(future)

    async def give_up(self, future: Future) -> None:
        """A sample is not wanted any more: it fails, wherever it is."""
        if self.supervisor.holding:
            self.sampling.give_up(future)
        else:
            await self._store.futures.give_up(future.request_id, GIVEN_UP)
            for settled in await self._store.futures.settled_of([future.request_id]):
                self._on_settled(settled)

    async def drop(self, run_id: str) -> None:
        """Free a run's memory, wherever it is."""
        if self.supervisor.holding:
            self.training.drop(run_id)
        else:
            await self._store.database.tell(Notice("dropped", run_id, self.name))

    async def _feed_forever(self) -> None:
        while True:
            if await self._state_to_act_on() is EngineState.WAITING:
                await self._forget()
                await self.supervisor.reaches(*(set(EngineState) - {EngineState.WAITING}))
                continue
            engine = await self.supervisor.ready()
            try:
                await self._reload()
                self._reading.succeeded(surely=True)
                self._engine = engine
                await self._feed(engine)
                return
            except* (EngineLost, StoreUnavailable, Interrupted) as group:
                causes = "; ".join(dict.fromkeys(str(error) for error in group.exceptions))
                self._reading.failed(f"engine {self.name}: starting over from the database: {causes}")
            except* (
                Exception
            ):  # boundary: a bug must not silence an engine for good; it is logged, memory is rebuilt
                log.exception("engine %s: unexpected error while feeding it", self.name)
            finally:
                self._engine = None
            if engine.lost.done() and not engine.abandoned:
                self._put_down(engine)
            await asyncio.sleep(_PAUSE_S)

    async def _state_to_act_on(self) -> EngineState:
        """Ready, or waiting for the lease. Until then others do what they can of what is owed."""
        reached = self.supervisor.reaches(EngineState.READY, EngineState.WAITING)
        if self._hand_over is None:
            return await reached
        state = asyncio.ensure_future(reached)
        try:
            while not state.done():
                with contextlib.suppress(StoreUnavailable):
                    await self._hand_over(self)
                await asyncio.wait({state}, timeout=_HAND_OVER_S)
            return state.result()
        finally:
            state.cancel()

    async def _forget(self) -> None:
        """Another gateway has the engine, and it alone knows what waits for it. Nobody here is to blame for the end of
        the process that was given up."""
        self._died_over = []
        self._read = False
        await self.sampling.reset()
        self.training.reset()
        self._on_lost(self.name)

    def _put_down(self, engine: EngineProcess) -> None:
        """Find out over what an engine has died."""
        if self.training.restoring is not None:
            self._blame.died_restoring(engine.last_signs, self.training.restoring)
        self._died_over += self._blame.died(
            engine.last_signs, self.training.in_engine, self.sampling.in_engine, engine.lost_samples
        )

    async def _count_deaths(self) -> None:
        """Write down what engines have died over, before anything of it is tried again. A gateway that dies blames
        nobody."""
        await self._store.futures.count_deaths(self._died_over)
        self._died_over = []

    async def _reload(self) -> None:
        """Forget what is in memory, then read what this engine owes; what arrives meanwhile is kept."""
        await self._count_deaths()
        await self._store.futures.requeue(self.name, self.supervisor.epoch)
        self._read = False
        await self.sampling.reset()
        self.sampling.epoch = self.supervisor.epoch
        self.training.reset()
        for future in await self._store.futures.open_of_engine(self.name):
            self._on_opened(future)
            if future.run_id is None:
                self.sampling.accept(future)
            else:
                self.training.reopen(future)
        self._read = True

    async def _feed(self, engine: EngineProcess) -> None:
        """Until both lanes have been closed and are empty; raises what ends it before."""
        quarantine = Quarantine()  # a new one for each engine process: nobody is in it yet
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_raise_when_lost(engine))
            lanes = [
                group.create_task(self.training.feed(engine, quarantine)),
                group.create_task(self.sampling.feed(engine, quarantine)),
            ]
            await asyncio.wait(lanes)
            watch.cancel()


def _left(deadline: float) -> float:
    return max(deadline - asyncio.get_running_loop().time(), 0.0)


async def _raise_when_lost(engine: EngineProcess) -> None:
    cause = await asyncio.shield(engine.lost)
    raise EngineLost(f"engine {engine.config.name} is gone: {cause}")
