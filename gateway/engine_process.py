"""One engine process: started with its own interpreter, spoken to by messages, gone at once when it dies.

An `EngineProcess` lives as long as its operating system process. Whoever waits for an answer when it dies gets
`EngineLost`. Starting again is the supervisor's business (`gateway.supervisor`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from engines import messages
from engines.interface import EngineConfig, EngineInfo, UserError
from engines.messages import RunAddress, SampleDelta
from engines.operations import OperationKind
from engines.vitals import Doing, Signs, Vitals
from gateway.engine_watch import Patience, until_condemned
from gateway.errors import EngineFailed, EngineLost
from gateway.launching import Launch

log = logging.getLogger(__name__)

T = TypeVar("T")

_DEATH_S = 10.0
"""Seconds that a killed process is waited for; one that hangs inside a system call dies when that returns."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished sample: its encoded SampleResult, and the tokens that it has used."""

    body: bytes
    prompt_tokens: int
    cached_tokens: int
    sampled_tokens: int


class EngineStartFailed(Exception):
    """The process could not be started or could not load its model; the message says why."""


class ModelRefused(EngineStartFailed):
    """It will not load before somebody changes something: the settings, the model's folder, what is installed."""


class EngineProcess:
    """A running engine. Made by `start`."""

    info: EngineInfo
    tokenizer_files: dict[str, bytes]

    def __init__(self, config: EngineConfig, launch: Launch, patience: Patience) -> None:
        self.config = config
        self.stats: dict[str, float] = {}
        self.served = False
        """Whether it has answered a call, so that starting it was worth it."""
        self.last_signs = Signs(0, (0, 0), Doing.NOTHING, 0)
        """Once it is lost: what it was doing then."""
        self.lost_samples = 0
        """Once it is lost: how many samples it was drawing."""
        self.abandoned = False
        """Whether it has ended because this process was silent or has lost its lease, for which nothing that it did is
        to blame."""
        self._launch = launch
        self._patience = patience
        self._vitals = Vitals.create()
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        self._address = f"ipc://{Path(self._folder.name) / 'engine.sock'}"
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[tuple[messages.Performed, list[bytes]]]] = {}
        self._snapshots: dict[int, asyncio.Future[messages.SnapshotTaken]] = {}
        self._samples: dict[int, asyncio.Queue[SampleDelta | Drawn | Exception]] = {}
        self._drawing: dict[int, Callable[[], None]] = {}
        """Of the samples those whose end has not come from the engine, and who is told of it."""
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        """Process id, once started."""
        return self._process.pid if self._process is not None else None

    @classmethod
    async def start(
        cls, config: EngineConfig, launch: Launch, timeout_s: float, patience: Patience
    ) -> EngineProcess:
        """Start a process and wait until its model is loaded. Raises EngineStartFailed, of which ModelRefused."""
        engine = cls(config, launch, patience)
        try:
            await engine._spawn()
            await asyncio.wait_for(asyncio.shield(engine._ready), timeout_s)
        except TimeoutError as error:
            await engine.kill()
            raise EngineStartFailed(f"the model was not loaded within {timeout_s:.0f} s") from error
        except (FileNotFoundError, PermissionError) as error:
            await engine.kill()
            raise ModelRefused(
                f"its interpreter {launch.command[0]!r} cannot be run: {error.strerror}"
            ) from error
        except (OSError, zmq.ZMQError, EngineLost) as error:
            await engine.kill()
            raise EngineStartFailed(str(error)) from error
        except BaseException:  # boundary: whatever it is, no process and no folder is left behind
            await engine.kill()
            raise
        return engine

    async def perform(
        self,
        kind: OperationKind,
        runs: Sequence[RunAddress],
        payloads: Sequence[bytes],
        *,
        replay: bool = False,
    ) -> tuple[messages.Performed, list[bytes]]:
        """One operation of each of several runs: their outcomes, and the results of those that succeeded.

        Raises EngineLost if the process dies first; then it is not known which of them were applied.
        """
        call_id = next(self._ids)
        answer: asyncio.Future[tuple[messages.Performed, list[bytes]]] = (
            asyncio.get_running_loop().create_future()
        )
        self._calls[call_id] = answer
        header = messages.Perform(call_id, self.config.epoch, kind, list(runs), replay=replay)
        await self._send(header, *payloads)
        return await answer

    async def begin_snapshot(self, run: RunAddress, folder: str) -> asyncio.Future[messages.SnapshotTaken]:
        """Have a run's state copied before anything that is sent later is done. What is returned is the answer to come,
        when the snapshot lies in `folder`; it raises EngineLost if the process dies first.
        """
        call_id = next(self._ids)
        answer: asyncio.Future[messages.SnapshotTaken] = asyncio.get_running_loop().create_future()
        self._snapshots[call_id] = answer
        await self._send(messages.TakeSnapshot(call_id, self.config.epoch, run.run_id, run.seq_id, folder))
        return answer

    async def restore(
        self, run: RunAddress, folder: str, checksums: dict[str, str], create_run: bytes
    ) -> messages.Performed:
        """Have a run as its snapshot in `folder` holds it, after operation `run.seq_id`. `create_run` is its first one.

        A failure of category `user` says what is damaged. Raises EngineLost.
        """
        call_id = next(self._ids)
        answer: asyncio.Future[tuple[messages.Performed, list[bytes]]] = (
            asyncio.get_running_loop().create_future()
        )
        self._calls[call_id] = answer
        call = messages.Restore(call_id, self.config.epoch, run.run_id, run.seq_id, folder, checksums)
        await self._send(call, create_run)
        performed, _ = await answer
        return performed

    async def sample(
        self, body: bytes, party: str, *, stream: bool = False, on_drawn: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[SampleDelta | Drawn, None]:
        """Deltas, if asked for, then what has been drawn. Closing the iterator early cancels the sample.

        `on_drawn` is called when the engine is done with it, or is lost, however much is still to be taken from here.
        Raises UserError when the engine refuses the request, EngineFailed when it fails and EngineLost when it dies.
        """
        call_id = next(self._ids)
        queue: asyncio.Queue[SampleDelta | Drawn | Exception] = asyncio.Queue()
        self._samples[call_id] = queue
        self._drawing[call_id] = on_drawn
        finished = False
        try:
            await self._send(messages.Sample(call_id, stream, party), body)
            while not finished:
                item = await queue.get()
                finished = not isinstance(item, SampleDelta)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._samples.pop(call_id, None)
            self._drawing.pop(call_id, None)
            if not finished and not self.lost.done():
                await self._send(messages.Cancel(call_id))

    async def drop_run(self, run_id: str) -> None:
        """Free what a run occupies."""
        await self._send(messages.DropRun(run_id))

    @property
    def busy(self) -> bool:
        """Whether it has calls or samples, whoever sent them."""
        return bool(self._calls or self._samples)

    async def stop(self, within_s: float) -> None:
        """Let the process finish the call at hand and exit; kill it when the time is over."""
        if self._process is None:
            return
        with contextlib.suppress(EngineLost):
            await self._send(messages.Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), within_s)
        await self.kill()

    async def kill(self) -> None:
        """End the process at once and release everything."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._await_death(self._process)
        self._lose("it was stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._folder.cleanup()
        self._vitals.close()

    # ------------------------------------------------------------------ inside

    async def _spawn(self) -> None:
        self._socket.bind(self._address)
        self._process = await asyncio.create_subprocess_exec(
            *self._launch.command,
            "--connect",
            self._address,
            "--vitals",
            str(self._vitals.descriptor),
            "--owner-timeout",
            str(self.config.owner_timeout_s),
            stdin=asyncio.subprocess.PIPE,  # closes when this process dies, and then the engine exits
            env=self._launch.environment,
            pass_fds=(self._vitals.descriptor,),
        )
        self._tasks = [
            asyncio.create_task(self._receive_forever(), name=f"engine-{self.config.name}-receive"),
            asyncio.create_task(self._ping_forever(), name=f"engine-{self.config.name}-ping"),
            asyncio.create_task(self._await_end(self._process), name=f"engine-{self.config.name}-end"),
            asyncio.create_task(self._watch(self._process), name=f"engine-{self.config.name}-watch"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_done)

    async def _send(self, message: messages.ToEngine, *payloads: bytes) -> None:
        if self.lost.done():
            raise EngineLost(f"engine {self.config.name} is gone: {self.lost.result()}")
        try:
            await self._socket.send_multipart(messages.pack(message, *payloads), copy=False)
        except asyncio.CancelledError:
            # A socket that is closed cancels what waits to be sent, as if whoever sends it were not wanted any more.
            task = asyncio.current_task()
            if not self.lost.done() or (task is not None and task.cancelling()):
                raise
            raise EngineLost(f"engine {self.config.name} is gone: {self.lost.result()}") from None

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """A process that cannot be listened to any more is of no use: better started again than waited for."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("engine %s: what it says cannot be understood", self.config.name, exc_info=error)
            if self._process is not None and self._process.returncode is None:
                self._process.kill()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """A process that shows no life, or gets no further, is killed; whoever waits for it is told at once."""
        cause = await until_condemned(self._vitals, self._patience)
        log.error("engine %s: process %d is killed: %s", self.config.name, process.pid, cause)
        self._lose(cause)
        if process.returncode is None:
            process.kill()

    async def _await_death(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), _DEATH_S)
        except TimeoutError:
            log.error("engine %s: process %d was killed and does not end", self.config.name, process.pid)

    async def _await_end(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        self.abandoned = self.abandoned or status == messages.EXIT_OWNER_GONE
        if status == messages.EXIT_NODE_LOST:
            self._lose("its node is lost")
            return
        cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self._lose(f"its process ended ({cause})")

    async def _ping_forever(self) -> None:
        while not self.lost.done():
            await asyncio.sleep(self.config.owner_timeout_s / 10)
            with contextlib.suppress(EngineLost):
                await self._send(messages.Ping())
            if self._process is not None and self._process.stdin is not None and not self.lost.done():
                self._process.stdin.write(b".")  # which is noticed in the middle of a call too

    async def _receive_forever(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            message, payloads = messages.unpack_from_engine(frames)
            await self._accept(message, payloads)

    async def _accept(self, message: messages.FromEngine, payloads: list[bytes]) -> None:
        match message:
            case messages.Performed():
                self.served = True
                _resolve(self._calls.pop(message.call_id, None), (message, payloads))
            case messages.SnapshotTaken():
                _resolve(self._snapshots.pop(message.call_id, None), message)
            case messages.SampleDelta():
                self._put(message.call_id, message)
            case messages.Sampled():
                self.served = True
                self._put(message.call_id, _sample_outcome(message, payloads))
            case messages.Pong():
                self.stats = message.stats
            case messages.Hello():
                await self._greet(message)
            case messages.Ready():
                self.info = message.info
                self.tokenizer_files = dict(zip(message.tokenizer_files, payloads, strict=True))
                _resolve(self._ready, None)
            case messages.LoadFailed():
                failure = ModelRefused if message.final else EngineStartFailed
                _fail(self._ready, failure(message.message))

    async def _greet(self, hello: messages.Hello) -> None:
        if hello.protocol == messages.PROTOCOL:
            await self._send(messages.Load(self.config))
            return
        problem = (
            f"{self._launch.command[0]} has engine protocol {hello.protocol}, this gateway {messages.PROTOCOL}; "
            "install the same version of Tandem in both environments"
        )
        _fail(self._ready, ModelRefused(problem))

    def _put(self, call_id: int, item: SampleDelta | Drawn | Exception) -> None:
        queue = self._samples.get(call_id)
        if queue is not None:
            queue.put_nowait(item)
        if not isinstance(item, SampleDelta) and (on_drawn := self._drawing.pop(call_id, None)) is not None:
            on_drawn()

    def _lose(self, cause: str) -> None:
        """Tell everyone who waits that no answer will come."""
        if self.lost.done():
            return
        self.last_signs = self._vitals.read()
        self.lost_samples = len(self._drawing)
        self.lost.set_result(cause)
        error = EngineLost(f"engine {self.config.name} is gone: {cause}")
        _fail(self._ready, error)
        waiting: list[asyncio.Future[Any]] = [*self._calls.values(), *self._snapshots.values()]
        for answer in waiting:
            _fail(answer, error)
        self._calls.clear()
        self._snapshots.clear()
        for call_id in list(self._samples):
            self._put(call_id, error)


def _resolve(waiting: asyncio.Future[T] | None, answer: T) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(answer)


def _fail(waiting: asyncio.Future[Any], error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # retrieved here too, so that asyncio does not warn when nobody waits


def _sample_outcome(message: messages.Sampled, payloads: list[bytes]) -> Drawn | Exception:
    if message.failure is not None:
        if message.failure.category == "user":
            return UserError(message.failure.message)
        return EngineFailed(message.failure.message, error_id=message.failure.error_id)
    return Drawn(payloads[0], message.prompt_tokens, message.cached_tokens, message.sampled_tokens)
