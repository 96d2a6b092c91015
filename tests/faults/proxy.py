"""The fixed address of one or several gateways: passes requests on to one that is there, and notes what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence

from tests.chaos.proxy import Message, Proxy, Trouble

_PATIENCE_S = 1.0
"""A gateway that does not say within this time that it is alive gets no requests, and those that it has are broken off,
as load balancers do. With a single gateway there is nowhere else to go, and they wait."""
_EVERY_S = 0.5


class FailOver(Proxy):
    """Adds no trouble of its own. What a gateway answers goes through whole or not at all: half of an answer is a
    broken connection."""

    def __init__(self, upstreams: Sequence[int], answers: dict[str, bytes]) -> None:
        super().__init__(upstreams[0], Trouble(0.0, 0.0, 0.0, 0.0), 0, answers)
        self.refusals: list[str] = []
        self._upstreams = list(upstreams)
        self._preferred = 0
        self._watching: list[asyncio.Task[None]] = []
        self._away: dict[int, asyncio.Event] = {port: asyncio.Event() for port in upstreams}

    async def _serve(
        self, started: threading.Event, stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    ) -> None:
        self._watching = [asyncio.create_task(self._watch(port)) for port in self._upstreams]
        await super()._serve(started, stop)  # which cancels them, with everything else, when it ends

    async def _watch(self, port: int) -> None:
        """Ask a gateway again and again whether it is alive."""
        if len(self._upstreams) == 1:
            return
        alive = Message(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1", b"")
        while True:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    answer = await self._exchange(port, alive)
            except (OSError, TimeoutError):
                answer = b""
            if answer:
                self._away[port].clear()
            else:
                self._away[port].set()
            await asyncio.sleep(_EVERY_S)

    async def _forward(self, message: Message, delay_s: float) -> bytes:
        """The answer of the first gateway that is there; empty when none is, or the one that was asked went away."""
        for _ in self._upstreams:
            port = self._upstreams[self._preferred % len(self._upstreams)]
            if not self._away[port].is_set():
                with contextlib.suppress(ConnectionRefusedError):
                    return await self._exchange_while_there(port, message)
            self._preferred += 1
        return b""

    async def _exchange_while_there(self, port: int, message: Message) -> bytes:
        exchange = asyncio.create_task(self._exchange(port, message))
        gone = asyncio.create_task(self._away[port].wait())
        try:
            await asyncio.wait({exchange, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not exchange.done():
                return b""
            answer = exchange.result()
        finally:
            exchange.cancel()
            gone.cancel()
        self._note(message, answer)
        return answer.replace(b"\r\nconnection: close", b"", 1)

    async def _exchange(self, port: int, message: Message) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(message.for_one_use())
            answer = await reader.read()
        finally:
            writer.close()
        return answer if _is_whole(answer) else b""

    def _note(self, message: Message, answer: bytes) -> None:
        """Keep what is neither a success nor a request to try again in a moment. The SDK's heartbeat may come when its
        session has just been closed; it knows what the answer means."""
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        self.happened[f"status {status}"] += 1
        late_heartbeat = status == 410 and message.path.endswith("/session_heartbeat")
        if status not in (0, 200, 503) and not late_heartbeat:
            body = answer.partition(b"\r\n\r\n")[2][:500].decode(errors="replace")
            self.refusals.append(f"{time.time():.3f} {message.path}: {status} {body}")


def _is_whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) == int(value)
        if name.lower() == b"transfer-encoding":
            return body.endswith(b"0\r\n\r\n")
    return True
