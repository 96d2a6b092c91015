"""The loop on the gateway's machine: between the gateway's socket and page, and the place on the node."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import zmq

from engines.on_ray.channel import Kind, Listener, status_of
from engines.vitals import Vitals

_LOOK_MS = 200
SIGN = b"."
GONE = b"x"


class Wake:
    """A pipe by which other threads tell the loop something."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def tell(self, what: bytes) -> None:
        """SIGN: the gateway lives. GONE: the place has ended."""
        os.write(self._writer, what)

    def close(self) -> None:
        """Nobody tells anything any more."""
        os.close(self.reader)
        os.close(self._writer)


class Ended(NamedTuple):
    """How an engine process has ended. `status` is its exit status, negative for a signal; None when its place was lost
    and nobody knows. `heard_at`: when its place was heard of last, by the monotonic clock; None: never."""

    status: int | None
    heard_at: float | None


def watch(wait: Callable[[], None], wake: Wake) -> None:
    """Tell the loop when `wait` returns, which it does when the place has ended, however that was."""

    def work() -> None:
        wait()
        wake.tell(GONE)

    threading.Thread(target=work, name="place", daemon=True).start()


class Relay:
    """From the first message to the last."""

    def __init__(
        self,
        gateway: zmq.Socket[bytes],
        listener: Listener,
        vitals: Vitals,
        wake: Wake,
        last_word_s: float = 2.0,
    ) -> None:
        """`last_word_s`: how long what a place has said before its end may be on its way."""
        self._last_word_s = last_word_s
        self._gateway = gateway
        self._place = listener.socket
        self._vitals = vitals
        self._wake = wake
        self._poller = zmq.Poller()
        for source in (self._place, wake.reader):
            self._poller.register(source, zmq.POLLIN)
        self._status: int | None = None
        self._gone_at: float | None = None
        self._heard_at: float | None = None

    def run(self) -> Ended:
        """Relay until the engine process has ended or its place is lost. Nothing is taken from the gateway before the
        place has come."""
        while self._status is None:
            events = dict(self._poller.poll(_LOOK_MS))
            if self._gateway in events:
                self._send(Kind.MESSAGE, *self._gateway.recv_multipart(copy=False))
            if self._place in events:
                self._hear()
            elif self._gone_at is not None and time.monotonic() - self._gone_at > self._last_word_s:
                break
            if self._wake.reader in events:
                self._take_in(os.read(self._wake.reader, 4096))
        return Ended(self._status, self._heard_at)

    def _hear(self) -> None:
        kind, *frames = self._place.recv_multipart(copy=False)
        if self._heard_at is None:
            self._poller.register(self._gateway, zmq.POLLIN)
            self._send(Kind.ALIVE)
        self._heard_at = time.monotonic()
        match kind.bytes:
            case Kind.MESSAGE:
                self._gateway.send_multipart(frames, copy=False)
            case Kind.PAGE:
                self._vitals.paste(frames[0].bytes)
            case Kind.END:
                self._vitals.paste(frames[0].bytes)
                self._status = status_of(frames[1].bytes)

    def _take_in(self, told: bytes) -> None:
        if SIGN in told and self._heard_at is not None:
            self._send(Kind.ALIVE)
        if GONE in told:
            self._is_gone()

    def _send(self, *frames: bytes | zmq.Frame) -> None:
        """To the place; when the connection to it is lost that is the end."""
        try:
            self._place.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._is_gone()

    def _is_gone(self) -> None:
        if self._gone_at is None:
            self._gone_at = time.monotonic()
