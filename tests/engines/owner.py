"""The other end of an engine process's socket: starts the process and speaks to it, one step at a time."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import zmq

from engines.interface import EngineConfig
from engines.messages import (
    Failure,
    FromEngine,
    Hello,
    Load,
    Perform,
    Performed,
    Ready,
    RunAddress,
    ToEngine,
    pack,
    unpack_from_engine,
)
from engines.operations import Operation, OperationKind, encode
from engines.vitals import Vitals
from gateway.settings import engine_environment

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0

Message = TypeVar("Message", bound=FromEngine)


class Owner:
    """Starts an engine process and owns it; what the process logs is in `log()` when it has ended."""

    def __init__(
        self,
        storage: Path,
        *,
        arguments: Sequence[str] = (),
        python: str = sys.executable,
        module: str = "engines.host",
        **settings: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "name": "tested",
            "plugin": "fake",
            "base_model": "test/bytes",
            "model": "test/bytes",
            "roles": ("train", "sample"),
            "storage": str(storage),
            "epoch": 5,
        }
        self.config = EngineConfig(**{**defaults, **settings})
        self.payloads: list[bytes] = []
        self._folder = tempfile.TemporaryDirectory(prefix="owner-")
        self._log = Path(self._folder.name) / "log"
        address = f"ipc://{self._folder.name}/socket"
        self.vitals = Vitals.create()
        page = self.vitals.descriptor
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [
                    python,
                    "-m",
                    module,
                    "--connect",
                    address,
                    "--vitals",
                    str(page),
                    *arguments,
                ],
                pass_fds=(page,),
                stdin=subprocess.PIPE,
                stderr=stream,
                cwd=ROOT,
                env=engine_environment(),
            )

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._socket.close()
        self._context.term()
        self.vitals.close()
        self._folder.cleanup()

    def send(self, message: ToEngine, *payloads: bytes) -> None:
        self._socket.send_multipart(pack(message, *payloads))

    def receive(self, wanted: type[Message], timeout_s: float = PATIENCE_S) -> Message:
        """The next message, which must be of this type; its payload frames are in `payloads` then."""
        message = self.next(timeout_s)
        assert isinstance(message, wanted), f"{message} came instead of {wanted.__name__}; log: {self.log()}"
        return message

    def next(self, timeout_s: float = PATIENCE_S) -> FromEngine:
        if not self._socket.poll(int(timeout_s * 1000)):
            raise AssertionError(f"nothing came within {timeout_s} s; log: {self.log()}")
        message, self.payloads = unpack_from_engine(self._socket.recv_multipart())
        return message

    def all_there(self) -> list[tuple[FromEngine, list[bytes]]]:
        """Everything that has come, without waiting."""
        found = []
        while self._socket.poll(0):
            found.append((self.next(0), self.payloads))
        return found

    def silent_for(self, seconds: float) -> bool:
        return not self._socket.poll(int(seconds * 1000))

    def load(self, timeout_s: float = PATIENCE_S) -> Ready:
        """Say hello and have the model loaded."""
        self.receive(Hello, timeout_s)
        self.send(Load(self.config))
        return self.receive(Ready, timeout_s)

    def ask(self, call_id: int, items: Sequence[tuple[str, int, Operation]], **more: Any) -> None:
        """Send operations of several runs, all of one kind, without waiting."""
        kind: OperationKind = items[0][2].__struct_config__.tag  # type: ignore[assignment]
        addresses = [RunAddress(run_id, seq_id) for run_id, seq_id, _ in items]
        epoch = more.pop("epoch", self.config.epoch)
        call = Perform(call_id, epoch, kind, addresses, **more)
        self.send(call, *(encode(operation) for _, _, operation in items))

    def perform(self, *items: tuple[str, int, Operation], **more: Any) -> Performed:
        """Perform operations of several runs, all of one kind."""
        self.ask(1, items, **more)
        return self.receive(Performed)

    def failure(self, *items: tuple[str, int, Operation], **more: Any) -> Failure:
        """The failure of the first operation of a call."""
        failure = self.perform(*items, **more).outcomes[0].failure
        assert failure is not None
        return failure

    def exit_status(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)

    def log(self) -> str:
        return self._log.read_text()
