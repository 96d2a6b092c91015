"""What runs on the node: an actor that starts an engine process there and relays for it.

Ray is not imported here: whoever places the class makes an actor of it. The actor answers one short call and then
stays in one long one, in its main thread, for as long as the engine process lives: it is the parent of that process,
which dies with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from engines.environment import for_engine
from engines.interface import Meeting
from engines.on_ray.channel import Keys, Kind, connect, end_of
from engines.vitals import BEAT_S, Vitals

_LOOK_MS = int(BEAT_S * 1000)
_LAST_MS = 500
"""How long what a process has sent before its end may be on its way through the system."""
_PREFIX = "tandem-place-"
_LOCK = "lock"
_UNHEARD_S = 30.0
"""Seconds that the other relay may take to be there; after that the engine process is stopped."""


class Introduction(NamedTuple):
    """What the other end needs to know of a place."""

    public_key: bytes
    host: str
    storage: bool
    """Whether the storage folder holds the mark that was put into it; so it is also when there is none."""
    python: str
    """The interpreter that engine processes get; empty: it is not there."""
    meeting: str = ""
    """`host:port` at which rank 0 will be for the others; empty: there are none."""


class Place:
    """One engine process on this node."""

    def __init__(self, python: str, ranks: int = 1, ip: str = "") -> None:
        """`python` is its interpreter; empty: the one that Ray uses here. With several `ranks` it is rank 0, which
        listens for the others at `ip`, the node's address, and at no other."""
        self._keys = Keys.new()
        self._ranks = ranks
        self._ip = ip
        self._meeting = socket.create_server((ip, 0)) if ranks > 1 else None
        self._python = shutil.which(python or sys.executable) or ""
        self._shares = True

    def introduce(self, mark: str) -> Introduction:
        """Say what this place is. `mark` is the path of a file that is there if the storage folder is shared; empty:
        what is stored is brought from elsewhere, and has a folder of this place's own."""
        self._shares = bool(mark)
        shared = not mark or Path(mark).is_file()
        meeting = "" if self._meeting is None else _address_of(self._meeting)
        return Introduction(self._keys.public, os.uname().nodename, shared, self._python, meeting)

    def follow(self, plugin: str, address: str, rank: int, size: int) -> int:
        """Be another rank of an engine, from the start of a process to its end; gives its exit status. `address` is the
        `meeting` of rank 0's place."""
        command = [self._python, "-m", "engines.on_ray.joining", "--plugin", plugin, "--meet", address]
        command += ["--own-ip", self._ip, "--rank", str(rank), "--size", str(size)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=for_engine()) as process:
            try:
                return process.wait()
            finally:
                process.kill()

    def serve(self, address: str, server_key: bytes, owner_timeout_s: float) -> int:
        """From the start of the process to its end; gives its exit status, which has been told by the channel too."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        vitals = Vitals.create()
        with _own_folder() as folder:
            inner = context.socket(zmq.DEALER)
            inner.set_hwm(0)
            inner.setsockopt(zmq.LINGER, 0)
            inner.bind(f"ipc://{folder}/engine.sock")
            outer = connect(context, address, self._keys, server_key)
            process = self._spawn(folder, vitals, owner_timeout_s)
            try:
                return _Relaying(process, vitals, inner, outer).until_the_end()
            finally:
                process.kill()
                process.wait()
                inner.close()
                outer.close()
                context.term()
                vitals.close()

    def _spawn(self, folder: str, vitals: Vitals, owner_timeout_s: float) -> subprocess.Popen[bytes]:
        command = [self._python, "-m", "engines.host", "--die-with-parent"]
        command += ["--connect", f"ipc://{folder}/engine.sock"]
        command += [] if self._shares else ["--storage", f"{folder}/copies"]
        command += ["--vitals", str(vitals.descriptor), "--owner-timeout", str(owner_timeout_s)]
        passed = [vitals.descriptor]
        if self._meeting is not None:
            meeting = Meeting(_address_of(self._meeting), self._ranks, self._meeting.fileno())
            command += ["--meeting", msgspec.json.encode(meeting).decode()]
            passed.append(meeting.descriptor)
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=for_engine(), pass_fds=passed, bufsize=0)


def _address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"{host}:{port}"


@contextmanager
def _own_folder() -> Iterator[str]:
    """A folder for one engine. Ray ends actors without a word: those that such ones have left here are removed first,
    which nobody holds any more."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), (old / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, Path(folder, _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


class _Relaying:
    """The loop beside a running process."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        vitals: Vitals,
        inner: zmq.Socket[bytes],
        outer: zmq.Socket[bytes],
    ) -> None:
        self._process = process
        self._vitals = vitals
        self._inner = inner
        self._outer = outer
        self._poller = zmq.Poller()
        self._poller.register(inner, zmq.POLLIN)
        self._poller.register(outer, zmq.POLLIN)
        self._ended = inner.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        """Has something to say when all that the process has sent is here, and it is gone."""
        self._heard = False
        self._page_at = 0.0

    def until_the_end(self) -> int:
        """Relay for as long as the process lives, and say how it has ended."""
        begun = time.monotonic()
        self._show()  # which is how the other relay learns that somebody is there
        while (status := self._process.poll()) is None:
            events = dict(self._poller.poll(_LOOK_MS))
            if self._outer in events:
                self._inward()
            if self._inner in events:
                self._outward()
            self._show()
            if not self._heard and time.monotonic() - begun > _UNHEARD_S:
                self._process.kill()
        self._ended.poll(_LAST_MS)
        while self._inner.poll(0):
            self._outward()
        self._inner.disable_monitor()
        self._send(*end_of(self._vitals.copy(), status))
        return status

    def _inward(self) -> None:
        kind, *frames = self._outer.recv_multipart(copy=False)
        self._heard = True
        if kind.bytes == Kind.MESSAGE:
            self._inner.send_multipart(frames, copy=False)
        elif self._process.stdin is not None:
            try:
                self._process.stdin.write(b".")
            except BrokenPipeError:
                return  # it has just ended, which is seen above

    def _outward(self) -> None:
        frames = self._inner.recv_multipart(copy=False)
        self._send(Kind.MESSAGE, *frames)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._page_at >= BEAT_S:
            self._page_at = now
            self._send(Kind.PAGE, self._vitals.copy())

    def _send(self, *frames: bytes | zmq.Frame) -> None:
        """To the other relay; when the connection to it is lost that is the end."""
        try:
            self._outer.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._process.kill()
