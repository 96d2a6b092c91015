"""A proxy that mistreats HTTP requests: it loses, repeats, delays and reorders them, and counts what it did."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

_HEAD_END = b"\r\n\r\n"
_LARGEST_HEAD = 64 * 1024


@dataclass(frozen=True, slots=True)
class Trouble:
    """How often what happens, as shares of all requests. A delay is drawn evenly up to the longest, so that requests
    that are under way together overtake each other."""

    lost_requests: float = 0.2
    lost_answers: float = 0.2
    repeated: float = 0.1
    longest_delay_s: float = 0.02
    latest_repeat_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Message:
    """One request as it came."""

    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        """What it asks for."""
        return self.head.split(b" ", 2)[1].decode()

    def for_one_use(self) -> bytes:
        """Its bytes for a connection of its own, which ends with the answer."""
        lines = [line for line in self.head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*lines, b"Connection: close"]) + _HEAD_END + self.body


class Proxy:
    """Listens on a port of its own, in a thread of its own. `answers` are given by the proxy itself, by path, whatever
    the server would say."""

    def __init__(
        self, upstream: int, trouble: Trouble, seed: int, answers: dict[str, bytes] | None = None
    ) -> None:
        self.happened: Counter[str] = Counter()
        self.port = 0
        self._upstream = upstream
        self._trouble = trouble
        self._draw = random.Random(seed)
        self._answers = answers if answers is not None else {}
        self._repeats: set[asyncio.Task[bytes]] = set()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Serve until the block ends."""
        started = threading.Event()
        stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(started, stop)), daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            loop, event = stop[0]
            loop.call_soon_threadsafe(event.set)
            thread.join(30)

    async def _serve(
        self, started: threading.Event, stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    ) -> None:
        server = await asyncio.start_server(self._converse, "127.0.0.1", 0, backlog=2048)
        self.port = server.sockets[0].getsockname()[1]
        stopped = asyncio.Event()
        stop.append((asyncio.get_running_loop(), stopped))
        started.set()
        await stopped.wait()
        server.close()
        # what was accepted last has begun then, and closes its connection when it is cancelled
        await asyncio.sleep(0.05)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one client's connection, one after the other, until one is mistreated or either side is done."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while (answer := await self._treat(await _read_message(reader))) is not None:
                writer.write(answer)
                await writer.drain()
        writer.close()

    async def _treat(self, message: Message) -> bytes | None:
        """The answer to a request; None: the connection breaks without one."""
        if message.path in self._answers:
            body = self._answers[message.path]
            return (
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
        trouble, fate = self._trouble, self._draw.random()
        self.happened["requests"] += 1
        if fate < trouble.lost_requests:
            self.happened["lost requests"] += 1
            return None
        await asyncio.sleep(self._draw.uniform(0, trouble.longest_delay_s))
        if self._draw.random() < trouble.repeated:
            self.happened["repeated"] += 1
            late = self._draw.choice([0.0, trouble.latest_repeat_s])
            repeat = asyncio.create_task(self._forward(message, self._draw.uniform(0, late)))
            self._repeats.add(repeat)
            repeat.add_done_callback(self._repeats.discard)
        answer = await self._forward(message, 0.0)
        if fate < trouble.lost_requests + trouble.lost_answers:
            self.happened["lost answers"] += 1
            return None
        return answer or None

    async def _forward(self, message: Message, delay_s: float) -> bytes:
        await asyncio.sleep(delay_s)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(message.for_one_use())
            answer = await reader.read()
        finally:
            writer.close()
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        self.happened[f"status {status}"] += 1
        return answer.replace(b"\r\nconnection: close", b"", 1)


async def _read_message(reader: asyncio.StreamReader) -> Message:
    head = (await reader.readuntil(_HEAD_END)).removesuffix(_HEAD_END)
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
        assert name.strip().lower() != b"transfer-encoding", "no SDK sends a body without its length"
    return Message(head, await reader.readexactly(length))
