"""Keeps one engine running: takes its lease, starts it with a new epoch, notices its death, starts it again.

The state says what an operator sees; `engine()` hands out the process for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from dataclasses import replace

from engines.interface import EngineConfig, EngineInfo
from gateway.engine_process import EngineProcess, EngineStartFailed, ModelRefused
from gateway.errors import EngineUnavailable, ModelNotLoadable, StoreUnavailable
from gateway.settings import EngineSettings, Settings
from gateway.store import Store
from gateway.store.leases import LeaseRequest
from gateway.text import TextCodec

log = logging.getLogger(__name__)

_LONGEST_DELAY_S = 60.0
_FAILED_DELAY_S = 60.0
"""Seconds after which a model that could not be loaded is tried again: somebody may have put it right meanwhile."""
_STEADY_S = 60.0


class EngineState(enum.StrEnum):
    """What an engine is doing."""

    WAITING = "waiting"  # another gateway dispatches for it
    STARTING = "starting"  # its process loads the model
    READY = "ready"  # it takes work
    DOWN = "down"  # it died or could not start; it is started again after a pause
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
        self._settings = settings
        self._store = store
        self._holder = holder
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Start supervising; call it in the running loop."""
        self._task = asyncio.create_task(self._supervise(), name=f"supervise-{self.engine.name}")

    async def stop(self) -> None:
        """Stop the process and give the lease back."""
        self._stopping = True
        if self.process is not None:
            await self.process.stop()  # first: the task below kills what it finds running
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._become(EngineState.STOPPED)
        if self.epoch:
            with contextlib.suppress(StoreUnavailable):
                await self._store.leases.renew(replace(self._lease_request(), seconds=0))

    async def ready(self) -> EngineProcess:
        """The running process; waits for it as long as it takes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state is EngineState.READY)
        assert self.process is not None
        return self.process

    def now(self) -> EngineProcess:
        """The running process; raises ModelNotLoadable, or EngineUnavailable saying what the engine does instead."""
        self.require_loadable()
        if self.state is EngineState.READY and self.process is not None:
            return self.process
        raise EngineUnavailable(
            f"the engine of {self.engine.base_model} is {self.described}; try again in a moment"
        )

    @property
    def described(self) -> str:
        """Its state, and why when it is not well."""
        unwell = self.problem and self.state is not EngineState.READY
        return f"{self.state} ({self.problem})" if unwell else str(self.state)

    def require_loadable(self) -> None:
        """Raises ModelNotLoadable, with the engine's own sentence: nobody can tell how long new work would wait."""
        if self.state is EngineState.FAILED:
            raise ModelNotLoadable(
                f"the engine of {self.engine.base_model} cannot load it: {self.problem}", param="base_model"
            )

    async def _supervise(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            started_at = loop.time()
            outcome = await self._live_once()
            if self._stopping:
                return
            failures = 0 if loop.time() - started_at > _STEADY_S else failures + 1
            delay = _FAILED_DELAY_S if outcome is EngineState.FAILED else self._delay(failures)
            log.warning(
                "engine %s is %s: %s; starting it again in %.1f s",
                self.engine.name,
                outcome,
                self.problem,
                delay,
            )
            await self._become(outcome)
            await asyncio.sleep(delay)

    async def _live_once(self) -> EngineState:
        """One life of the engine; what it is in after that, which `problem` explains."""
        try:
            await self._live()
        except ModelRefused as error:
            self.problem = str(error)
            return EngineState.FAILED
        except (EngineStartFailed, StoreUnavailable) as error:
            self.problem = str(error)
        except (
            Exception
        ) as error:  # boundary: whatever it is, the engine is started again and the log says why
            log.exception("engine %s: unexpected error while supervising it", self.engine.name)
            self.problem = f"unexpected error, see the log: {type(error).__name__}"
        return EngineState.DOWN

    def _delay(self, failures: int) -> float:
        return min(self._settings.engine_restart_delay_s * 2.0 ** (failures - 1), _LONGEST_DELAY_S)

    async def _live(self) -> None:
        """From lease to death."""
        self.epoch = await self._take_lease()
        if self.state is not EngineState.FAILED:  # which it stays until it does load
            await self._become(EngineState.STARTING)
        self.starts += 1
        self.process = await EngineProcess.start(
            self._config(), self.engine.python, self._settings.engine_start_timeout_s
        )
        try:
            self.info = self.process.info
            self.tokenizer_files = self.process.tokenizer_files
            self.text = await asyncio.to_thread(TextCodec.from_files, self.process.tokenizer_files)
            self.problem = None
            log.info(
                "engine %s is ready: %s on %s", self.engine.name, self.engine.base_model, self.info.device
            )
            await self._become(EngineState.READY)
            self.problem = await self._until_lost(self.process)
        finally:
            await self._become(EngineState.DOWN)
            await self.process.kill()
            self.process = None

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
        )

    async def _until_lost(self, process: EngineProcess) -> str:
        """Keep the lease while the process lives; why it is over."""
        while True:
            done, _ = await asyncio.wait({process.lost}, timeout=self._settings.lease_s / 3)
            if done:
                return process.lost.result()
            try:
                if not await self._store.leases.renew(self._lease_request()):
                    return "another gateway has taken over its lease"
            except (
                Exception
            ) as error:  # boundary: whoever else takes the lease ends this; a failed renewal need not
                log.warning("engine %s: the lease could not be renewed: %s", self.engine.name, error)

    async def _take_lease(self) -> int:
        while True:
            epoch = await self._store.leases.take(self._lease_request())
            if epoch is not None:
                return epoch
            await self._become(EngineState.WAITING)
            await asyncio.sleep(self._settings.lease_s / 3)

    def _lease_request(self) -> LeaseRequest:
        return LeaseRequest(self.engine.name, self._holder, self._settings.lease_s)

    async def _become(self, state: EngineState) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()
