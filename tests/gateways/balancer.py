"""What stands before several gateways: connections go to the first that answers, and end when it does not any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ASK_EVERY_S = 0.1
_ANSWERS_WITHIN_S = 0.5
_CHUNK = 1 << 16
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Balancer:
    """Listens on a port of its own, in a thread of its own. `order` are the ports of the gateways, the preferred first;
    it may be changed at any time, for new connections."""

    def __init__(self, *order: int) -> None:
        self.order = list(order)
        self.port = 0
        self.switches = 0
        self._alive: dict[int, bool] = dict.fromkeys(order, True)
        self._pipes: dict[asyncio.StreamWriter, int] = {}
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _run(self, started: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        checks = [asyncio.create_task(self._check(port)) for port in self.order]
        started.set()
        await stop.wait()
        server.close()
        ending = [*checks, *self._serving]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _check(self, port: int) -> None:
        while True:
            try:
                # Not wait_for, which before Python 3.12 may lose the cancellation that ends this.
                async with asyncio.timeout(_ANSWERS_WITHIN_S):
                    alive = await _answers(port)
            except (OSError, TimeoutError):
                alive = False
            if self._alive[port] and not alive:
                self.switches += 1
                for writer in [writer for writer, of in self._pipes.items() if of == port]:
                    writer.transport.abort()
            self._alive[port] = alive
            await asyncio.sleep(_ASK_EVERY_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = next((port for port in self.order if self._alive[port]), None)
        if port is None:
            writer.transport.abort()
            return
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        self._pipes |= {writer: port, to_there: port}
        try:
            await asyncio.gather(_pipe(reader, to_there), _pipe(there, writer))
        finally:
            for each in (writer, to_there):
                del self._pipes[each]
                each.transport.abort()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side ends; then the other is told."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _answers(port: int) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_REQUEST)
        return b" 200 " in await reader.readline()
    finally:
        writer.close()


@contextmanager
def balanced(*ports: int) -> Iterator[Balancer]:
    """A running balancer."""
    balancer = Balancer(*ports)
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(balancer._run(started, stop),), daemon=True
    )
    thread.start()
    started.wait(10)
    try:
        yield balancer
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
