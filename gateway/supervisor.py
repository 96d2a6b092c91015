"""Keeps one engine running: takes its lease, starts it with a new epoch, notices its end, starts it again.

While another gateway has the lease this one waits for it, and knows what the engine has told there. The state says what
an operator sees; `now` hands out the process for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging

from engines.interface import EngineConfig, EngineInfo
from gateway.engine_process import EngineProcess, EngineStartFailed, ModelRefused
from gateway.engine_settings import EngineSettings
from gateway.engine_watch import Patience
from gateway.errors import EngineElsewhere, EngineUnavailable, ModelNotLoadable, StoreUnavailable
from gateway.launching import launch_of
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.engine_facts import EngineFacts
from gateway.store.leases import Lease, LeaseRequest
from gateway.text import TextCodec
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

_LONGEST_DELAY_S = 60.0
_FAILED_DELAY_S = 60.0
"""Seconds after which a model that could not be loaded is tried again: somebody may have put it right meanwhile."""
_STEADY_S = 60.0
"""Seconds of a life after which the next one follows soon, also when no call was answered in it."""
_LEAST_STOP_S = 1.0
"""Seconds for an idle process to exit by itself, however little of the time to drain is left."""
_FAILING_STARTS = 3
"""Starts in a row that must fail before new work is refused."""
_UNRENEWED = 2 / 3
"""Part of a lease that may pass without a renewal; in the rest of it the engine's process ends."""
_AGAIN = 1 / 15
"""Part of a lease after which a renewal that failed is tried again: a database that restarts is often soon back."""


class LeaseLost(Exception):
    """The lease is another gateway's, or may be soon; the message says why."""


class EngineState(enum.StrEnum):
    """What an engine is doing."""

    WAITING = "waiting"  # another gateway dispatches for it
    STARTING = "starting"  # its process loads the model
    READY = "ready"  # it takes work
    DOWN = "down"  # it died or could not start; it is started again after a pause
    FAILING = "failing"  # several starts in a row have failed; it is tried again, more and more rarely
    FAILED = "failed"  # it cannot load its model, and says what to change; it is tried again now and then
    STOPPED = "stopped"  # the gateway shuts down


class Supervisor:
    """One engine of the settings."""

    def __init__(self, engine: EngineSettings, settings: Settings, store: Store, holder: str) -> None:
        self.engine = engine
        self.state = EngineState.STARTING
        self.problem: str | None = None
        self.starts = 0
        self.epoch = 0
        self.info: EngineInfo | None = None
        self.text: TextCodec | None = None
        self.tokenizer_files: dict[str, bytes] | None = None
        self.process: EngineProcess | None = None
        self.holding = False
        """Whether the lease is this process's, as far as it knows."""
        self.elsewhere: Lease | None = None
        """Another gateway's lease, as it was when it was looked at last."""
        self._facts_epoch = 0
        self._free = asyncio.Event()
        self._settings = settings
        self._store = store
        self._holder = holder
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._stopping = False
        self._bad_lives = 0
        self._failed_starts = 0
        self._started_at = 0.0
        self._renewing = Trouble(log, f"engine {engine.name}: the lease is renewed again")
        self._starting = Trouble(log, f"engine {engine.name} has its lease")
        self._storeless = False
        """Whether its last life ended, or could not begin, because the database did not answer."""
        self._renewed_at = 0.0
        """When the lease was asked for that this process has, by the loop's time."""

    def start(self) -> None:
        """Start supervising; call it in the running loop."""
        self._task = asyncio.create_task(self._supervise(), name=f"supervise-{self.engine.name}")

    def close(self) -> None:
        """Hand the process out to nobody new: the gateway shuts down."""
        self._closed = True

    async def stop(self, deadline: float) -> None:
        """Stop the process, by the loop's time `deadline` or soon after, and give the lease back."""
        self._stopping = True
        try:
            if self.process is not None:  # first: the task below kills what it finds running
                left_s = deadline - asyncio.get_running_loop().time()
                await self.process.stop(max(left_s, _LEAST_STOP_S))
        finally:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            await self._become(EngineState.STOPPED)
            await self._let_go()

    def look(self) -> None:
        """The lease may be free."""
        self._free.set()

    async def reaches(self, *states: EngineState) -> EngineState:
        """Waits until the engine is in one of these states here, as long as it takes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state in states)
            return self.state

    async def ready(self) -> EngineProcess:
        """The running process; waits for it as long as it takes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state is EngineState.READY)
        assert self.process is not None
        return self.process

    def now(self) -> EngineProcess:
        """The running process; raises ModelNotLoadable, EngineElsewhere when another gateway has it ready, or
        EngineUnavailable saying what the engine does instead."""
        self.require_loadable()
        if self._closed:
            raise EngineUnavailable("the gateway shuts down; try again in a moment")
        if self.state is EngineState.READY and self.process is not None:
            return self.process
        if self.elsewhere is not None and self.wherever is EngineState.READY:
            raise EngineElsewhere(self.engine.base_model, self.elsewhere.url)
        raise EngineUnavailable(
            f"the engine of {self.engine.base_model} is {self.described}; try again in a moment"
        )

    @property
    def coming_back(self) -> bool:
        """Whether it has been ready, here or elsewhere, and is started here again, which is worth waiting for."""
        if self._closed or self.info is None:
            return False
        dead = self.process is not None and self.process.lost.done()
        return self.state in (EngineState.STARTING, EngineState.DOWN) or (
            self.state is EngineState.READY and dead
        )

    @property
    def wherever(self) -> EngineState:
        """What the engine does, here or at the gateway that has it."""
        there = self._there
        return EngineState(there.state) if there is not None and there.state else self.state

    @property
    def trouble(self) -> str | None:
        """Why it is not well, here or at the gateway that has it."""
        there = self._there
        return there.problem if there is not None else self.problem

    @property
    def _there(self) -> Lease | None:
        return self.elsewhere if self.state is EngineState.WAITING else None

    @property
    def described(self) -> str:
        """Its state, and why when it is not well."""
        unwell = self.trouble and self.wherever is not EngineState.READY
        state = str(self.wherever) if self._there is None else f"{self.wherever} at another gateway"
        return f"{state} ({self.trouble})" if unwell else state

    def require_loadable(self) -> None:
        """Raises ModelNotLoadable, with the engine's own sentence, or EngineUnavailable while it fails to start over
        and over: nobody can tell how long new work would wait."""
        if self.wherever is EngineState.FAILED:
            raise ModelNotLoadable(
                f"the engine of {self.engine.base_model} cannot load it: {self.trouble}", param="base_model"
            )
        if self.wherever is EngineState.FAILING:
            raise EngineUnavailable(
                f"the engine of {self.engine.base_model} is {self.described}; new work is taken when it has started"
            )

    async def _supervise(self) -> None:
        while True:
            outcome = await self._live_once()
            if self._stopping:
                return
            delay = _FAILED_DELAY_S if outcome is EngineState.FAILED else self._delay()
            told = (
                f"engine {self.engine.name} is {outcome}: {self.problem}; starting it again in {delay:.1f} s"
            )
            if self._storeless:
                self._starting.failed(told)  # every half second, as long as the database is away
            else:
                log.warning("%s", told)
            await self._become(outcome)
            if delay > self._settings.lease_s / 2:
                await self._let_go()  # another gateway may have more luck meanwhile
            await asyncio.sleep(delay)

    async def _live_once(self) -> EngineState:
        """One life of the engine; what it is in after that, which `problem` explains."""
        self._bad_lives += 1
        self._storeless = False
        try:
            await self._live()
        except ModelRefused as error:
            self.problem = str(error)
            return EngineState.FAILED
        except EngineStartFailed as error:
            return self._start_failed(str(error))
        except (StoreUnavailable, LeaseLost) as error:  # which says nothing about the engine
            self._bad_lives = max(self._bad_lives - 1, 0)
            self._storeless = isinstance(error, StoreUnavailable)
            self.problem = str(error)
        except (
            Exception
        ) as error:  # boundary: whatever it is, the engine is started again and the log says why
            log.exception("engine %s: unexpected error while supervising it", self.engine.name)
            self.problem = f"unexpected error, see the log: {type(error).__name__}"
        return EngineState.DOWN

    def _start_failed(self, problem: str) -> EngineState:
        self._failed_starts += 1
        if self._failed_starts < _FAILING_STARTS:
            self.problem = problem
            return EngineState.DOWN
        self.problem = f"{self._failed_starts} starts in a row have failed, the last one because {problem}"
        return EngineState.FAILING

    def _delay(self) -> float:
        """Doubles with each life in which nothing was achieved; a good one is followed by the next at once."""
        doubled = 2.0 ** min(max(self._bad_lives - 1, 0), 30)
        return min(self._settings.engine_restart_delay_s * doubled, _LONGEST_DELAY_S)

    async def _live(self) -> None:
        """From lease to death. Raises LeaseLost when the lease is over first; the process has ended then."""
        self.epoch = await self._take_lease()
        self._starting.succeeded(surely=True)
        life = asyncio.create_task(self._live_under_lease(), name=f"live-{self.engine.name}")
        keeping = asyncio.create_task(self._keep_lease(), name=f"lease-{self.engine.name}")
        try:
            await asyncio.wait({life, keeping}, return_when=asyncio.FIRST_COMPLETED)
            self.problem = life.result() if life.done() else keeping.result()
            if not life.done():
                raise LeaseLost(self.problem)
        except LeaseLost:
            if self.process is not None:
                self.process.abandoned = True
            raise
        finally:
            life.cancel()
            keeping.cancel()
            await asyncio.gather(life, keeping, return_exceptions=True)
            await self._end_process()

    async def _live_under_lease(self) -> str:
        """From start to death, and why it died. To cancel it while the model is loaded ends the process."""
        if self.wherever in (EngineState.FAILED, EngineState.FAILING):  # which it stays until it does load
            self.problem = self.trouble
            await self._become(self.wherever)
        else:
            await self._become(EngineState.STARTING)
        self.starts += 1
        settings = self._settings
        patience = Patience(settings.engine_silence_s, settings.engine_hang_s)
        self.process = await EngineProcess.start(
            self._config(),
            launch_of(self.engine, settings),
            settings.engine_start_timeout_s,
            patience,
        )
        self._started_at = asyncio.get_running_loop().time()
        self._failed_starts = 0
        await self._serve(self.process)
        return await asyncio.shield(self.process.lost)

    async def _end_process(self) -> None:
        if self.process is None:
            return
        if self.process.served or asyncio.get_running_loop().time() - self._started_at > _STEADY_S:
            self._bad_lives = 0
        await self._become(EngineState.DOWN)
        await self.process.kill()
        self.process = None

    async def _serve(self, process: EngineProcess) -> None:
        """Hand it out, and tell the other gateways. Raises LeaseLost."""
        self.info = process.info
        self.tokenizer_files = process.tokenizer_files
        self.text = await asyncio.to_thread(TextCodec.from_files, process.tokenizer_files)
        self.problem = None
        log.info("engine %s is ready: %s on %s", self.engine.name, self.engine.base_model, self.info.device)
        await self._become(EngineState.READY)
        await self._tell(process)

    def _config(self) -> EngineConfig:
        engine, settings = self.engine, self._settings
        return EngineConfig(
            name=engine.name,
            plugin=engine.plugin,
            base_model=engine.base_model,
            model=engine.source,
            roles=engine.roles,
            storage=str(settings.storage_dir.resolve()),
            epoch=self.epoch,
            options=engine.options,
            owner_timeout_s=settings.engine_owner_timeout_s,
            run_memory_bytes=engine.run_memory_bytes,
            adapter_memory_bytes=engine.adapter_memory_bytes,
            sampling_share=engine.sampling_share,
            storage_url=settings.storage_url,
        )

    async def _tell(self, process: EngineProcess) -> None:
        """What gateways without this engine need to know of it; they look at it when they look at the lease.
        Raises LeaseLost."""
        facts = EngineFacts(self.engine.name, self.epoch, process.info, process.tokenizer_files)
        try:
            if not self._settings.embedded:
                await self._store.engine_facts.tell(facts)
                await self._renew()
        except StoreUnavailable as error:
            log.warning("engine %s: other gateways learn of it later: %s", self.engine.name, error)

    async def _renew(self) -> None:
        """Raises LeaseLost."""
        asked_at = asyncio.get_running_loop().time()
        if not await self._store.leases.renew(self._lease_request()):
            self.holding = False
            raise LeaseLost("another gateway has taken over its lease")
        self._renewed_at = asked_at

    async def _keep_lease(self) -> str:
        """Renew the lease for as long as that is possible; why it is over.

        An embedded database that does not answer ends nothing: nobody else can take the lease.
        """
        lease_s = self._settings.lease_s
        now = asyncio.get_running_loop().time
        next_at = self._renewed_at + lease_s / 3
        while True:
            bound = None if self._settings.embedded else self._renewed_at + lease_s * _UNRENEWED
            in_time = asyncio.timeout_at(bound)
            try:
                async with in_time:
                    await asyncio.sleep(next_at - now())
                    await self._renew()
                self._renewing.succeeded(surely=True)
                next_at = self._renewed_at + lease_s / 3
            except LeaseLost as error:
                return str(error)
            except Exception as error:  # boundary: whatever is wrong with the database may pass
                if in_time.expired():
                    return f"its lease could not be renewed for {lease_s * _UNRENEWED:.1f} s"
                self._renewing.failed(f"engine {self.engine.name}: the lease could not be renewed: {error}")
                next_at = now() + lease_s * (1 / 3 if self._settings.embedded else _AGAIN)

    async def _take_lease(self) -> int:
        while True:
            self._free.clear()
            self._renewed_at = asyncio.get_running_loop().time()
            epoch = await self._store.leases.take(self._lease_request())
            if epoch is not None:
                self.holding = True
                return epoch
            self.holding = False
            left_s = await self._learn()
            if self.state is not EngineState.WAITING:
                log.info("engine %s: another gateway has its lease", self.engine.name)
            await self._become(EngineState.WAITING)
            with contextlib.suppress(TimeoutError):
                # Not wait_for, which before Python 3.12 loses a cancellation that comes with what it waits for.
                async with asyncio.timeout(max(0.05, min(self._settings.lease_s / 3, left_s))):
                    await self._free.wait()

    async def _learn(self) -> float:
        """What the engine does and has told at the gateway that has it; seconds for which its lease still runs."""
        self.elsewhere = lease = await self._store.leases.get(self.engine.name)
        facts = await self._store.engine_facts.newer_than(self.engine.name, self._facts_epoch)
        if facts is not None:
            self._facts_epoch = facts.epoch
            self.info, self.tokenizer_files = facts.info, facts.tokenizer_files
            self.text = await asyncio.to_thread(TextCodec.from_files, facts.tokenizer_files)
        return lease.seconds_left if lease is not None else 0.0

    async def _let_go(self) -> None:
        """Another gateway may have the lease at once."""
        if self.holding:
            self.holding = False
            with contextlib.suppress(StoreUnavailable):
                await self._store.leases.give_back(self._lease_request())

    def _lease_request(self) -> LeaseRequest:
        return LeaseRequest(self.engine.name, self._holder, self._settings.lease_s, self.state, self.problem)

    async def _become(self, state: EngineState) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()
