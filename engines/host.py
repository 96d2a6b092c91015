"""The engine process: `python -m engines.host --connect ipc://… --vitals 7`, started by the gateway.

It says Hello, loads the model that it is told to, and then repeats: receive → perform → reply. Training calls and
decoding steps share the time, so that neither keeps the other waiting for long. The process ends when its owner says
so, closes its standard input (as the system does for an owner that dies) or is silent, or by SIGTERM; what it holds in
memory can be built again from the runs' logs, so it may end anywhere. SIGINT is the owner's business. What it is doing
stands in a page that the owner reads (`engines.vitals`), also when this process does not answer any more.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import platform
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from engines.distant_folders import StorageUnreachable
from engines.interface import Engine, EngineBroken, EngineConfig, EngineInfo, LoadError, Meeting
from engines.messages import (
    EXIT_OWNER_GONE,
    PROTOCOL,
    Cancel,
    DropRun,
    Failure,
    FromEngine,
    Hello,
    Load,
    LoadFailed,
    Perform,
    Ping,
    Pong,
    Ready,
    Restore,
    Sample,
    SnapshotTaken,
    Stop,
    TakeSnapshot,
    ToEngine,
    pack,
    unpack_to_engine,
)
from engines.performing import TrainingCalls, failure_of_engine
from engines.registry import engine_class
from engines.sampling_calls import SamplingCalls
from engines.snapshot_writing import SnapshotWriter
from engines.storage import FolderStorage
from engines.vitals import Doing, Heart, Vitals

log = logging.getLogger("engines.host")

EXIT_STOPPED = 0
EXIT_LOAD_FAILED = 1
EXIT_BROKEN = 4

_PR_SET_PDEATHSIG = 1
_GREETING_S = 30.0
_LINGER_MS = 2000
_WRITING_MS = 20
"""How often an idle host looks whether a snapshot has been written."""

Socket = zmq.Socket[bytes]
Call = Perform | TakeSnapshot | Restore | DropRun
"""What is done in order, one at a time."""


class Host:
    """The loop of a loaded engine."""

    def __init__(
        self, socket: Socket, vitals: Vitals, engine: Engine, info: EngineInfo, config: EngineConfig
    ) -> None:
        self._socket = socket
        self._vitals = vitals
        self._engine = engine
        self._owner_timeout_s = config.owner_timeout_s
        self._training = TrainingCalls(engine, info, config)
        self._snapshots = SnapshotWriter(FolderStorage.of(config))
        self._samples = SamplingCalls(engine, info, self._send)
        self._news = engine.news
        self._told = False
        """Whether an engine that draws by itself has something to tell."""
        self._waiting: deque[tuple[Call, list[bytes]]] = deque()
        self._share = config.sampling_share
        self._lead_s = 0.0
        """What sampling is owed before the next training call."""
        self._stopped = False
        self._heard_at = time.monotonic()

    def serve(self) -> int:
        """Until the owner says stop or is silent; gives the exit status."""
        while True:
            self._receive()
            for taken in self._snapshots.finished():
                self._send(taken)
            if self._stopped:
                self._snapshots.close()
                return EXIT_STOPPED
            if time.monotonic() - self._heard_at > self._owner_timeout_s:
                log.error("its gateway has been silent for %.1f s", self._owner_timeout_s)
                return EXIT_OWNER_GONE
            self._work()

    def _receive(self) -> None:
        """Take in everything that has arrived; wait for something only when there is nothing to do.

        Signs of life that arrived during a long call are all here before the owner's silence is measured.
        """
        busy = bool(self._waiting) or (self._engine.sampling and self._news is None)
        idle_ms = _WRITING_MS if self._snapshots.busy else int(self._owner_timeout_s * 1000) + 1
        timeout_ms = 0 if busy else idle_ms
        while not self._stopped and self._hears(timeout_ms):
            message, payloads = unpack_to_engine(self._socket.recv_multipart())
            self._heard_at = time.monotonic()
            self._accept(message, payloads)
            timeout_ms = 0

    def _hears(self, timeout_ms: int) -> bool:
        """Whether the owner has said something. What an engine that draws by itself has to tell ends the waiting too;
        while it draws, this loop counts as drawing."""
        if self._news is None:
            return bool(self._socket.poll(timeout_ms))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._news, zmq.POLLIN)
        if self._engine.sampling:
            with self._vitals.meanwhile(Doing.SAMPLING):
                events = dict(poller.poll(timeout_ms))
        else:
            events = dict(poller.poll(timeout_ms))
        self._told = self._news in events
        return self._socket in events

    def _accept(self, message: ToEngine, payloads: list[bytes]) -> None:
        """Answer what is quick; keep what changes runs, in order."""
        match message:
            case Perform() | TakeSnapshot() | Restore() | DropRun():
                self._waiting.append((message, payloads))
            case Sample():
                with self._vitals.during(Doing.SAMPLING):
                    self._samples.start(message, payloads[0])
            case Cancel():
                self._samples.cancel(message.call_id)
            case Ping():
                self._send(Pong(self._engine.stats() | self._training.stats()))
            case Stop():
                self._stopped = True
            case Load():
                log.warning("a second load was ignored: a process serves one model")

    def _work(self) -> None:
        """One training call or one decoding step. While both have work sampling gets its share of the time, however
        long a call or a step takes.

        An owner may wait for a call's answer before it sends the next. What sampling is owed for a call therefore
        stays until sampling has had it or has nothing to do; training that is not there saves nothing up.
        """
        sampling = self._engine.sampling if self._news is None else self._told
        begun = time.monotonic()
        if not sampling:
            self._lead_s = 0.0
        if self._waiting and self._lead_s <= 0:
            self._perform(*self._waiting.popleft())
            self._lead_s += (time.monotonic() - begun) * self._share
        elif sampling:
            with self._vitals.during(Doing.SAMPLING):
                self._samples.advance()
            lead_s = self._lead_s - (time.monotonic() - begun) * (1 - self._share)
            self._lead_s = lead_s if self._waiting else max(lead_s, 0.0)

    def _perform(self, call: Call, payloads: list[bytes]) -> None:
        match call:
            case Perform():
                doing = Doing.REPLAYING if call.replay else Doing.TRAINING
                with self._vitals.during(doing, call.runs[0].seq_id if call.runs else 0):
                    performed, results = self._training.perform(call, payloads)
                self._send(performed, *results)
            case TakeSnapshot():
                with self._vitals.during(Doing.SNAPSHOT, call.seq_id):
                    self._take_snapshot(call)
            case Restore():
                with self._vitals.during(Doing.REPLAYING, call.seq_id):
                    restored = self._training.restore(call, payloads[0])
                self._send(restored)
            case DropRun():
                self._training.drop(call.run_id)

    def _take_snapshot(self, call: TakeSnapshot) -> None:
        snapshot = self._training.snapshot(call)
        if isinstance(snapshot, Failure):
            self._send(SnapshotTaken(call.call_id, snapshot))
        else:
            self._snapshots.begin(call, snapshot)

    def _send(self, message: FromEngine, *payloads: bytes) -> None:
        self._socket.send_multipart(pack(message, *payloads))


# ---------------------------------------------------------------------------- from greeting to exit


def run(socket: Socket, heart: Heart, **here: Any) -> int:
    """A process's whole life on a connected socket; gives its exit status. `here` are fields of its configuration that
    are other ones on this machine than its owner knows."""
    socket.send_multipart(pack(Hello(PROTOCOL, os.getpid(), platform.python_version())))
    said = _await_load(socket)
    if not isinstance(said, Load):
        return EXIT_STOPPED if isinstance(said, Stop) else EXIT_OWNER_GONE
    config = msgspec.structs.replace(said.config, **here)
    start_logging(config.name)
    with heart.vitals.during(Doing.LOADING):
        engine = _load(socket, config)
    if engine is None:
        return EXIT_LOAD_FAILED
    heart.passes = lambda: engine.passes
    info = engine.info()
    log.info("loaded %s: %s, %s on %s", config.base_model, info.architecture, info.dtype, info.device)
    log.info(
        "versions: %s", ", ".join(f"{name} {version}" for name, version in sorted(info.versions.items()))
    )
    status = Host(socket, heart.vitals, engine, info, config).serve()
    engine.close()
    log.info("ends with status %d", status)
    return status


def _await_load(socket: Socket) -> Load | Stop | None:
    """What the owner says, signs of life apart; None when it says nothing."""
    deadline = time.monotonic() + _GREETING_S
    while (left_s := deadline - time.monotonic()) > 0:
        if socket.poll(int(left_s * 1000) + 1):
            message, _ = unpack_to_engine(socket.recv_multipart())
            if isinstance(message, (Load, Stop)):
                return message
    log.error("the owner has not said what to load within %.0f s", _GREETING_S)
    return None


def _load(socket: Socket, config: EngineConfig) -> Engine | None:
    """The loaded engine, after telling the owner; None when it cannot be loaded, which the owner is told too."""
    try:
        require_storage(config)
        FolderStorage.of(config).watch_copies()
        engine = _class_of(config).load(config)
        files = engine.tokenizer_files()
        socket.send_multipart(pack(Ready(engine.info(), list(files)), *files.values()))
    except LoadError as error:
        log.error("%s cannot be loaded: %s", config.base_model, error)
        socket.send_multipart(pack(LoadFailed(str(error), final=True)))
        return None
    except StorageUnreachable as error:
        message = f"storage_url cannot be written to from {platform.node()}: {error}"
        log.error("%s", message)
        socket.send_multipart(pack(LoadFailed(message)))
        return None
    except Exception as error:  # the process boundary: a plugin may raise anything while it loads
        failure = failure_of_engine(error, "loading the model", f"loading {config.base_model}")
        socket.send_multipart(pack(LoadFailed(failure.message)))
        return None
    return engine


def require_storage(config: EngineConfig) -> None:
    """See that a storage elsewhere can be used here. Raises LoadError and StorageUnreachable."""
    try:
        FolderStorage.of(config).check()
    except (ImportError, ValueError) as error:
        kind = config.storage_url.partition("://")[0]
        raise LoadError(
            f"storage_url begins with {kind!r}, for which something is missing in the engine's interpreter: {error}; "
            "for S3: pip install fsspec s3fs"
        ) from error


def _class_of(config: EngineConfig) -> type[Engine]:
    """Raises LoadError."""
    found = engine_class(config.plugin)
    if config.meeting is not None and found.follower() is None:
        raise LoadError(
            f"ray.ranks is {config.meeting.ranks}, but an engine of the plugin {config.plugin} is one process: "
            "leave ray.ranks out"
        )
    return found


def exit_with_owner(timeout_s: float | None = None, on_sign: Callable[[], None] = lambda: None) -> None:
    """End the process when standard input closes, also in the middle of a call; or, once something has come by it, when
    nothing comes for `timeout_s` seconds: a paused owner's successor relies on it that nothing is written any more.

    `on_sign` is called, in a thread of its own, whenever something has come.
    """

    def watch() -> None:
        # Not sys.stdin: a thread that waits inside it would hold its lock when the interpreter shuts down.
        heard = False
        while True:
            # A second look, for this thread may have been kept waiting for longer than the owner.
            if not (_speaks(timeout_s if heard else None) or _speaks(0)):
                log.error("its gateway has been silent for %.1f s", timeout_s)
                os._exit(EXIT_OWNER_GONE)
            if not os.read(0, 4096):
                log.error("its gateway has gone")
                os._exit(EXIT_OWNER_GONE)
            heard = True
            on_sign()

    threading.Thread(target=watch, name="owner", daemon=True).start()


def die_with_parent() -> None:
    """Have the system kill this process when its parent is killed, also while it is stopped or stuck (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _speaks(within_s: float | None) -> bool:
    return bool(select.select([0], [], [], within_s)[0])


def start_logging(name: str) -> None:
    """One line an event on standard error, under the engine's name."""
    label = name.replace("%", "%%")
    layout = f"%(asctime)s %(levelname)s engine {label}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, stream=sys.stderr, force=True)


def _here(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of this machine."""
    found: dict[str, Any] = {}
    if arguments.storage:
        found["storage"] = arguments.storage
    if arguments.meeting:
        found["meeting"] = msgspec.json.decode(arguments.meeting, type=Meeting)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.host", description="An engine process of a gateway."
    )
    parser.add_argument(
        "--connect", required=True, metavar="ADDRESS", help="where the gateway listens: ipc://…"
    )
    parser.add_argument(
        "--vitals",
        required=True,
        type=int,
        metavar="FD",
        help="inherited descriptor of the page for vital signs",
    )
    parser.add_argument(
        "--owner-timeout",
        type=float,
        metavar="SECONDS",
        help="silence on standard input after which to exit, once something has come by it",
    )
    parser.add_argument(
        "--storage", default="", metavar="FOLDER", help="for copies of what is stored; not given: the owner's"
    )
    parser.add_argument(
        "--meeting",
        metavar="JSON",
        help="where ranks wait that others have started: engines.interface.Meeting",
    )
    parser.add_argument(
        "--die-with-parent", action="store_true", help="be killed by the system when the parent is killed"
    )
    arguments = parser.parse_args()
    address: str = arguments.connect
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.die_with_parent:
        die_with_parent()
    start_logging(f"process {os.getpid()}")
    exit_with_owner(arguments.owner_timeout)
    heart = Heart(Vitals(arguments.vitals))
    heart.start()
    context = zmq.Context()
    socket: Socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.connect(address)
    try:
        return run(socket, heart, **_here(arguments))
    except EngineBroken:
        log.critical("the engine is broken; only a new process helps", exc_info=True)
        os._exit(EXIT_BROKEN)  # at once: what would tidy up may need the device
    finally:
        socket.close()
        context.term()


if __name__ == "__main__":
    sys.exit(main())
