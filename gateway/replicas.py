"""The replicas of one sampling engine: how many there are, and moving samples from one to another.

How many there are to be stands in the database, for all gateways alike. What a replica owes that is not ready, that
ends or that nobody has, is moved to others; so is what waits for a busy one while another has little to do. Samples
that an engine is drawing stay there, unless it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from gateway.dispatch import Dispatcher
from gateway.dispatch.blame import Blame
from gateway.engine_settings import EngineSettings
from gateway.errors import StoreUnavailable
from gateway.replica_bounds import LARGEST, ReplicaBounds
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.notices import Notice
from gateway.store.records import Future
from gateway.store.replicas import Change, Move, Wanted, moved_to
from gateway.supervisor import EngineState
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

_TICK_S = 0.5
_ORPHANS_EVERY = 10
"""Ticks between looks for samples that no engine has."""
_MOVED_AT_A_TIME = 512
_WORTH_MOVING = 8
"""Samples that one replica must have more than another for what waits to move."""
_STOP_S = 10.0
"""Seconds for the process of a replica that has nothing to do any more to end."""
_STOPS = 5
"""Tries to stop it, if that fails."""
_STOP_AGAIN_S = 1.0
"""Seconds until the second one; they double."""


HandOver = Callable[[Dispatcher], Awaitable[None]]
Make = Callable[[EngineSettings, Blame, HandOver | None], Dispatcher]


class Replicas:
    """Those of one entry of the settings. `make` gives the dispatcher of a new one, which `forget` is called with when
    it has ended; `on_opened` is told of each sample that has moved."""

    def __init__(
        self,
        entry: EngineSettings,
        settings: Settings,
        store: Store,
        make: Make,
        forget: Callable[[Dispatcher], None],
        on_opened: Callable[[Future], None],
    ) -> None:
        self.entry = entry
        self.bounds = entry.bounds
        """Those that count now: the settings', or an admin's."""
        self.wanted = entry.bounds.min
        self.active: dict[int, Dispatcher] = {}
        """By their numbers; those that are ending are not among them."""
        self._ending: dict[int, asyncio.Task[None]] = {}
        self._store = store
        self._blame = Blame(settings.max_attempts)
        self._make = make
        self._forget = forget
        self._on_opened = on_opened
        self._trouble = Trouble(log, f"replicas of {entry.name} are tended again")
        self._fewer_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        for number in range(1, self.wanted + 1):
            self.active[number] = self._new(number)

    def _new(self, number: int) -> Dispatcher:
        hand_over = self.hand_over if "train" not in self.entry.roles else None
        return self._make(self.entry.replica(number), self._blame, hand_over)

    def start(self) -> None:
        """Start those that there are, and follow what there is to do; call it in the running loop."""
        for dispatcher in self.active.values():
            _start(dispatcher)
        if "train" not in self.entry.roles:
            self._task = asyncio.create_task(self._tend_forever(), name=f"replicas-{self.entry.name}")

    async def stop_tending(self) -> None:
        """Change nothing any more: the gateway shuts down, and drains whatever there is."""
        tasks = [task for task in (self._task, *self._ending.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def set_bounds(self, smallest: int | None, largest: int | None) -> None:
        """An admin's bounds, from now on and for all gateways; None for the settings' again."""
        bounds = _within(self.entry.bounds, smallest, largest)
        await self._store.replicas.put(Wanted(self.entry.name, bounds.within(self.wanted), smallest, largest))
        await self._agree()
        self._match()

    async def hand_over(self, source: Dispatcher) -> None:
        """What an engine owes that is not ready is done by others that are. Raises StoreUnavailable."""
        takers = [each for each in self.active.values() if each is not source and each.ready]
        if source.ready or not takers:
            return
        owed = await source.owed()
        if owed:
            log.info("engine %s: %d samples go to other replicas", source.name, len(owed))
        await self._share_out([(future, None) for future in owed], source, takers)

    # ------------------------------------------------------------------ how many

    async def _tend_forever(self) -> None:
        ticks = 0
        while True:
            try:
                await self._agree()
                self._match()
                await self._level()
                if ticks % _ORPHANS_EVERY == 0:
                    await self._take_orphans()
                ticks += 1
                self._trouble.succeeded()
            except StoreUnavailable as error:
                self._trouble.failed(f"replicas of {self.entry.name} are looked at again soon: {error}")
            except (
                Exception
            ):  # boundary: a bug must not leave the replicas alone for good; the log says what it was
                log.exception("replicas of %s: unexpected error while tending them", self.entry.name)
            await asyncio.sleep(_TICK_S)

    async def _agree(self) -> None:
        """How many there are to be: as was decided before, or more or fewer now."""
        decided = await self._store.replicas.get(self.entry.name)
        if decided is None:
            self.bounds, self.wanted = self.entry.bounds, self.entry.bounds.within(self.wanted)
        else:
            self.bounds = _within(self.entry.bounds, decided.smallest, decided.largest)
            self.wanted = self.bounds.within(decided.number)
        if self.bounds.min == self.bounds.max:
            return
        for dispatcher in list(self.active.values()):  # there may be others meanwhile
            await dispatcher.look()
        enough = self.bounds.enough(sum(dispatcher.load for dispatcher in self.active.values()))
        if self._is_time_for(enough):
            log.info("replicas of %s: %d instead of %d", self.entry.name, enough, self.wanted)
            await self._store.replicas.change(Change(self.entry.name, self.wanted, enough))
            self.wanted = enough

    def _is_time_for(self, enough: int) -> bool:
        """More are started at once; fewer are left when they have been enough for a while."""
        now = asyncio.get_running_loop().time()
        if enough >= self.wanted:
            self._fewer_since = None
            return enough > self.wanted
        if self._fewer_since is None:
            self._fewer_since = now
        return now - self._fewer_since >= self.bounds.idle_s

    def _match(self) -> None:
        """Start what is missing, end what is too many. A number whose engine is still ending is free when it has.

        All gateways go by the numbers, so the highest end; but one that is ready stays for one that is to be and is
        not, until that is ready too."""
        for number in range(1, self.wanted + 1):
            if number not in self.active and number not in self._ending:
                self.active[number] = dispatcher = self._new(number)
                _start(dispatcher)
        for number in self._too_many():
            ending = self._end(number, self.active.pop(number))
            self._ending[number] = asyncio.create_task(ending, name=f"end-{self.entry.name}-{number}")

    def _too_many(self) -> list[int]:
        unready = sum(1 for number, each in self.active.items() if number <= self.wanted and not each.ready)
        beyond = sorted(number for number in self.active if number > self.wanted)
        stay = [number for number in beyond if self.active[number].ready][:unready]
        return [number for number in beyond if number not in stay]

    async def _end(self, number: int, dispatcher: Dispatcher) -> None:
        """Let one go, and have its number free again. One that cannot be stopped, or whose end is cancelled, as the
        gateway's has begun, stays known and keeps its number and its devices; its process is ended at the gateway's."""
        for step in (self._empty, _drain):
            try:
                await step(dispatcher)
            except Exception:  # boundary: a bug must not keep a number for good; the log says what it was
                log.exception("engine %s: unexpected error while ending it", dispatcher.name)
        if not await _stopped(dispatcher):
            log.error("engine %s cannot be stopped: no other one gets its place", dispatcher.name)
            return
        self._forget(dispatcher)
        del self._ending[number]
        log.info("engine %s has ended: fewer replicas are wanted", dispatcher.name)
        with contextlib.suppress(StoreUnavailable):  # then it is done later
            await self._take_orphans()

    async def _empty(self, dispatcher: Dispatcher) -> None:
        """What waits for it goes to others, what it draws is finished, however long that takes."""
        while dispatcher.supervisor.holding and dispatcher.load:
            if dispatcher.supervisor.state is not EngineState.READY:
                break
            with contextlib.suppress(
                StoreUnavailable
            ):  # then they wait where they were, and it is tried again
                await self._share_out(dispatcher.sampling.take(_MOVED_AT_A_TIME), dispatcher, self._takers())
            await asyncio.sleep(_TICK_S / 5)

    # ------------------------------------------------------------------ who draws what

    def _takers(self) -> list[Dispatcher]:
        """Those that samples can go to: that are ready, or will be."""
        ready = [each for each in self.active.values() if each.ready]
        return ready or list(self.active.values())

    async def _level(self) -> None:
        """What waits for a busy engine goes to one that has less to do, if both are here."""
        here = [each for each in self.active.values() if each.ready and each.supervisor.holding]
        if len(here) < 2:
            return
        giver = max(here, key=lambda each: (each.sampling.waiting, each.load))
        taker = min(here, key=lambda each: each.load)
        more = giver.load - taker.load
        if more >= _WORTH_MOVING and giver.sampling.waiting:
            count = min(more // 2, _MOVED_AT_A_TIME)
            await self._move(giver.sampling.take(count), giver.name, taker, giver)

    async def _take_orphans(self) -> None:
        """Samples of replicas that there were once, and that nobody has any more."""
        numbers = {number for number in range(2, LARGEST + 1) if number not in self.active}
        names = [self.entry.replica(number).name for number in numbers - self._ending.keys()]
        orphans = await self._store.replicas.orphans(names, _MOVED_AT_A_TIME)
        takers = self._takers()
        for index, future in enumerate(orphans):
            await self._move([(future, None)], future.engine, takers[index % len(takers)])

    async def _share_out(
        self,
        samples: Sequence[tuple[Future, bytes | None]],
        source: Dispatcher,
        takers: Sequence[Dispatcher],
    ) -> None:
        """Each gets as many as bring all to the same load, nearly."""
        loads = {taker.name: taker.load for taker in takers}
        shares: dict[str, list[tuple[Future, bytes | None]]] = {name: [] for name in loads}
        for sample in samples:
            name = min(loads, key=lambda each: loads[each])
            loads[name] += 1
            shares[name].append(sample)
        moves = (self._move(shares[taker.name], source.name, taker, source) for taker in takers)
        for failure in await asyncio.gather(
            *moves, return_exceptions=True
        ):  # one need not keep back the others
            if failure is not None:
                raise failure

    async def _move(
        self,
        samples: Sequence[tuple[Future, bytes | None]],
        source: str,
        taker: Dispatcher,
        giver: Dispatcher | None = None,
    ) -> None:
        """Have another engine draw some samples. `giver` had them in its queue. Where the database does not answer,
        nobody knows whether that was stored: both have those then, and only the one that owes them can claim them."""
        notice = None if taker.supervisor.holding else taker.name
        moves = (
            self._store.replicas.move(
                Move(future.request_id, source, taker.name),
                Notice("accepted", future.request_id, notice) if notice is not None else None,
            )
            for future, _ in samples
        )
        answers = await asyncio.gather(*moves, return_exceptions=True)
        failures: list[BaseException] = []
        for (future, body), there in zip(samples, answers, strict=True):
            if isinstance(there, BaseException):
                failures.append(there)
                if giver is not None:
                    giver.accept(future, body)
                taker.accept(moved_to(taker.name, future), body)
            elif there is not None:
                self._on_opened(there)
                taker.accept(there, body)
                if giver is not None and giver.sampling.was_given_up(there.request_id):
                    await taker.give_up(there)
        if failures:
            raise failures[0]


def _start(dispatcher: Dispatcher) -> None:
    dispatcher.supervisor.start()
    dispatcher.start()


async def _drain(dispatcher: Dispatcher) -> None:
    await dispatcher.drain(asyncio.get_running_loop().time() + _STOP_S)


async def _stopped(dispatcher: Dispatcher) -> bool:
    """Whether its process has been ended, at last."""
    pause = _STOP_AGAIN_S
    for left in reversed(range(_STOPS)):
        try:
            await dispatcher.supervisor.stop(asyncio.get_running_loop().time() + _STOP_S)
            return True
        except (
            Exception
        ):  # boundary: a process that still runs must stay somebody's; the log says what it was
            log.exception("engine %s: unexpected error while ending it", dispatcher.name)
        if left:
            await asyncio.sleep(pause)
            pause *= 2
    return False


def _within(bounds: ReplicaBounds, smallest: int | None, largest: int | None) -> ReplicaBounds:
    """Bounds with an admin's in the place of the settings'."""
    if smallest is None or largest is None:
        return bounds
    return ReplicaBounds(smallest, largest, bounds.samples_each, bounds.idle_s)
