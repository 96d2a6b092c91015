"""The budget for bodies: what is taken comes back, who waits is served in turn, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import zstandard
from starlette.requests import Request
from starlette.types import Message

from gateway.bodies import SMALL, Bodies, BodyTooLarge, ReleasedBodies, Room, read_sent
from gateway.errors import NoRoom
from gateway.tinker.bodies import guessed_size

KIB = 1024


async def taking(room: Room, size: int, sender: str, order: list[str]) -> None:
    await room.take(size, sender)
    order.append(sender)


async def waiting(room: Room, senders: str, order: list[str], size: int = 10) -> list[asyncio.Task[None]]:
    """One after the other they ask for room that there is none of."""
    tasks = []
    for sender in senders:
        tasks.append(asyncio.create_task(taking(room, size, sender, order)))
        await asyncio.sleep(0)
    return tasks


async def test_no_more_is_taken_than_there_is() -> None:
    room, order = Room(10), list[str]()
    await room.take(4, "a")
    await room.take(6, "a")
    [task] = await waiting(room, "b", order, 1)
    await asyncio.sleep(0.01)
    assert (room.taken, order) == (10, [])
    room.give(4)
    await task
    assert room.taken == 7


async def test_senders_take_turns_and_nobody_is_overtaken_by_something_smaller() -> None:
    room, order = Room(10), list[str]()
    await room.take(10, "x")
    tasks = await waiting(room, "aaabc", order)
    tasks += await waiting(room, "d", order, 1)
    room.give(5)
    await asyncio.sleep(0.01)
    assert order == []  # `d` would fit
    room.give(5)
    for _ in range(5):
        await asyncio.sleep(0.01)
        room.give(10)
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c", "d", "a", "a"]


async def test_who_waits_too_long_is_told_and_what_is_behind_gets_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.bodies._LONGEST_WAIT_S", 0.05)
    room, order = Room(10), list[str]()
    await room.take(5, "x")
    large, small = await waiting(room, "a", order) + await waiting(room, "b", order, 5)
    with pytest.raises(NoRoom):
        await large
    await small
    assert (order, room.taken) == (["b"], 10)


async def test_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bodies._MOST_WAITING", 2)
    room = Room(10)
    await room.take(10, "x")
    tasks = await waiting(room, "ab", [])
    with pytest.raises(NoRoom, match="2 requests"):
        await room.take(1, "c")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    room.give(10)
    assert room.taken == 0


async def test_who_leaves_as_its_turn_comes_gives_back() -> None:
    room = Room(10)
    await room.take(10, "x")
    [task] = await waiting(room, "a", [])
    room.give(10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert room.taken == 0


def a_request(bodies: Bodies, parts: list[bytes], **headers: str) -> Request:
    """A request whose body comes in parts."""

    class State:
        pass

    class App:
        state = State()

    App.state.bodies = bodies  # type: ignore[attr-defined]
    left: Iterator[tuple[int, bytes]] = iter(enumerate(parts, 1))

    async def receive() -> Message:
        number, part = next(left)
        return {"type": "http.request", "body": part, "more_body": number < len(parts)}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "app": App(), "headers": raw}, receive)


async def answered(request: Request) -> None:
    """What the application does when a request has been answered."""

    async def app(*_: object) -> None:
        pass

    await ReleasedBodies(app)(request.scope, request.receive, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_counts_until_it_is_answered(declared: bool) -> None:
    bodies = Bodies(1000 * KIB, 4000 * KIB)
    parts = [bytes([number]) * (50 * KIB) for number in range(4)]
    headers = {"content_length": str(200 * KIB)} if declared else {}
    request = a_request(bodies, parts, **headers)
    assert await read_sent(request, bodies.largest) == b"".join(parts)
    assert bodies.sent.taken == (200 * KIB if declared else 1000 * KIB)
    await answered(request)
    assert bodies.sent.taken == 0


async def test_a_small_body_is_not_counted() -> None:
    bodies = Bodies(1000 * KIB, 1000 * KIB)
    await bodies.sent.take(1000 * KIB, "x")
    assert await read_sent(a_request(bodies, [bytes(SMALL)], content_length=str(SMALL)), 1000 * KIB) == bytes(
        SMALL
    )


async def test_a_body_over_the_limit_leaves_its_beginning() -> None:
    bodies = Bodies(100 * KIB, 100 * KIB)
    for parts in ([b"a" * KIB] * 101, [b"a" * (101 * KIB)]):
        with pytest.raises(BodyTooLarge, match=r"102400 bytes.*max_body_bytes") as raised:
            await read_sent(a_request(bodies, parts), bodies.largest)
        assert raised.value.beginning == b"a" * KIB


async def test_a_body_that_does_not_come_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bodies._PATIENCE_S", 0.05)
    request = a_request(Bodies(100, 100), [b""])

    async def silence() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    request._receive = silence
    with pytest.raises(NoRoom, match="slowly"):
        await read_sent(request, 100)


async def test_a_body_that_comes_in_time_may_take_long_and_one_that_stops_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.bodies._PATIENCE_S", 0.2)
    parts = [b"a" * KIB] * 8

    async def slowly(request: Request, coming: int) -> bytes:
        receive, came = request._receive, 0

        async def later() -> Message:
            nonlocal came
            came += 1
            await asyncio.sleep(0.05 if came <= coming else 60)
            return await receive()

        request._receive = later
        return await read_sent(request, 1000 * KIB)

    bodies = Bodies(1000 * KIB, 1000 * KIB)
    began = time.monotonic()
    assert await slowly(a_request(bodies, parts), len(parts)) == b"".join(parts)
    assert time.monotonic() - began > 0.2  # longer than anybody may be silent
    with pytest.raises(NoRoom, match="slowly"):  # long before what a body of the largest size may take
        await asyncio.wait_for(slowly(a_request(bodies, parts), 3), 10)


def test_the_size_is_what_the_frame_says_or_a_guess() -> None:
    assert guessed_size(zstandard.compress(bytes(10_000_000)), "zstd") == 10_000_000
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    for body, encoding in ((unsized, "zstd"), (b"?", "zstd"), (unsized, "gzip")):
        assert guessed_size(body, encoding) == 16 * len(body)
