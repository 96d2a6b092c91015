"""The duties of several gateways: one performs each, in its time; errors are told; the dead are succeeded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import update

from gateway.duties import Duties, Duty
from gateway.errors import StoreUnavailable
from gateway.store import Store, schema
from gateway.store.duties import DutyLease, DutyReport
from gateway.store.records import DutyRecord


def lease(holder: str, *, every_s: float = 100.0, seconds: float = 60.0) -> DutyLease:
    return DutyLease("sweep", holder, every_s, seconds)


async def only(store: Store) -> DutyRecord:
    [duty] = await store.duties.all()
    return duty


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass in 10 s")


async def test_one_holder_at_a_time_and_one_round_in_each_interval(store: Store) -> None:
    assert await store.duties.take(lease("me")) == 0
    assert 59 < await store.duties.take(lease("you")) <= 60
    assert not await store.duties.renew(lease("you"))
    assert await store.duties.renew(lease("me"))
    await store.duties.report(DutyReport(lease("you"), 1.0, 99))  # not theirs to report
    await store.duties.report(DutyReport(lease("me"), 2.5, 7))
    duty = await only(store)
    assert (duty.holder, duty.runs, duty.failures, duty.done, duty.last_done) == (None, 1, 0, 7, 7)
    assert (duty.last_seconds, duty.last_error, duty.failed_at) == (2.5, None, None)
    for holder in ("me", "you"):
        assert 99 < await store.duties.take(lease(holder)) <= 100


async def test_a_dead_holders_duty_is_taken_over(store: Store) -> None:
    assert await store.duties.take(lease("dead", seconds=0.05)) == 0
    await asyncio.sleep(0.06)
    assert await store.duties.take(lease("heir")) == 0
    assert not await store.duties.renew(lease("dead"))
    await store.duties.report(DutyReport(lease("dead"), 1.0, 5))
    assert (await only(store)).done == 0


async def test_a_duty_that_was_given_back_is_due_at_once(store: Store) -> None:
    assert await store.duties.take(lease("me")) == 0
    await store.duties.give_back(lease("you"))
    assert await store.duties.take(lease("you")) > 0
    await store.duties.give_back(lease("me"))
    assert await store.duties.take(lease("you")) == 0


async def test_an_error_is_kept_until_the_next_one(store: Store) -> None:
    for error in ("first", "x" * 1000, None):
        assert await store.duties.take(lease("me", every_s=0.0)) == 0
        await store.duties.report(DutyReport(lease("me"), 0.1, 1, error))
    duty = await only(store)
    assert (duty.runs, duty.failures, duty.done, duty.last_error) == (3, 2, 3, "x" * 300)
    assert duty.failed_at is not None and duty.last_run_at is not None
    assert time.time() - 60 < duty.failed_at <= duty.last_run_at


async def test_a_clock_that_was_set_back_stops_no_duty(store: Store) -> None:
    assert await store.duties.take(lease("me")) == 0
    await store.duties.report(DutyReport(lease("me"), 0.1, 1))
    ahead = {"last_run_at": time.time() + 1e6, "holder": "you", "expires_at": time.time() + 1e6}

    def set_ahead(connection: object, _: object) -> list[None]:
        connection.execute(update(schema.duties).values(ahead))  # type: ignore[attr-defined]
        return [None]

    await store.database.write(set_ahead, None)
    assert await store.duties.take(lease("me")) == 60  # as long as a lease lasts, and no longer


async def test_of_two_gateways_one_performs_a_duty(store: Store) -> None:
    rounds: list[str] = []
    at_once = 0

    def duty(who: str) -> Duty:
        async def run() -> int:
            nonlocal at_once
            at_once += 1
            assert at_once == 1
            rounds.append(who)
            await asyncio.sleep(0.1)
            at_once -= 1
            return 1

        return Duty("sweep", 0.2, run)

    both = [Duties(store, who, 5.0, [duty(who)]) for who in ("a", "b")]
    began = time.monotonic()
    for duties in both:
        duties.start()
    await asyncio.sleep(1.5)
    for duties in both:
        await duties.stop()
    took = time.monotonic() - began
    assert 2 <= len(rounds) <= took / 0.3 + 1  # one in 0.3 s, whoever it is
    assert (await only(store)).failures == 0


async def test_a_long_round_keeps_its_lease(store: Store) -> None:
    ended = asyncio.Event()

    async def long() -> int:
        await ended.wait()
        return 3

    duties = Duties(store, "me", 0.3, [Duty("sweep", 100, long)])
    duties.start()
    for _ in range(10):
        await asyncio.sleep(0.1)
        wait = await store.duties.take(lease("you", seconds=0.3))
        assert wait > 0 or not (await store.duties.all())
    ended.set()

    async def reported() -> bool:
        return (await only(store)).done == 3

    await until(reported)
    await duties.stop()


async def test_who_was_silent_for_too_long_stops_where_they_are(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = asyncio.Event()

    async def endless() -> int:
        try:
            await asyncio.sleep(1000)
        finally:
            stopped.set()
        return 0

    duties = Duties(store, "silent", 0.6, [Duty("sweep", 100, endless)])
    duties.start()

    async def taken() -> bool:
        return any(each.holder == "silent" for each in await store.duties.all())

    await until(taken)

    def take_away(connection: object, _: object) -> list[None]:
        connection.execute(update(schema.duties).values(holder="heir"))  # type: ignore[attr-defined]
        return [None]

    with caplog.at_level(logging.WARNING, "gateway"):
        await store.database.write(take_away, None)
        await asyncio.wait_for(stopped.wait(), 10)
        await asyncio.sleep(0.05)
    await duties.stop()
    assert "taken over" in caplog.text
    assert (await only(store)).holder == "heir"


async def test_an_error_ends_a_round_and_not_the_duty(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    rounds = 0

    async def stumbling() -> int:
        nonlocal rounds
        rounds += 1
        if rounds < 3:
            raise ValueError("something new")
        return 1

    duties = Duties(store, "me", 5.0)
    duties.add(Duty("sweep", 0.01, stumbling))
    with caplog.at_level(logging.WARNING, "gateway"):
        duties.start()

        async def went_on() -> bool:
            return any(each.done for each in await store.duties.all())

        await until(went_on)
    await duties.stop()
    duty = await only(store)
    assert (duty.failures, duty.last_error) == (2, "ValueError: something new")
    assert "something new" in caplog.text


async def test_a_database_that_does_not_answer_delays_the_next_round(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, calls, rounds = store.duties.take, 0, 0

    async def failing_at_first(wanted: DutyLease) -> float:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise StoreUnavailable("down")
        return await take(wanted)

    async def run() -> int:
        nonlocal rounds
        rounds += 1
        return 1

    monkeypatch.setattr(store.duties, "take", failing_at_first)
    duties = Duties(store, "me", 5.0, [Duty("sweep", 0.01, run)])
    duties.start()

    async def went_on() -> bool:
        return rounds >= 2

    await until(went_on)
    await duties.stop()


async def test_what_is_stopped_in_the_middle_is_left_to_others_at_once(store: Store) -> None:
    began = asyncio.Event()

    async def endless() -> int:
        began.set()
        await asyncio.sleep(1000)
        return 0

    duties = Duties(store, "me", 60.0, [Duty("sweep", 100, endless)])
    duties.start()
    await asyncio.wait_for(began.wait(), 10)
    await asyncio.wait_for(duties.stop(), 10)
    assert await store.duties.take(lease("you")) == 0


async def test_a_database_that_does_not_answer_holds_no_stop_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = asyncio.Event()

    async def endless() -> int:
        began.set()
        await asyncio.sleep(1000)
        return 0

    async def silent(_: DutyLease) -> None:
        await asyncio.sleep(1000)

    monkeypatch.setattr(store.duties, "give_back", silent)
    duties = Duties(store, "me", 60.0, [Duty("sweep", 100, endless)])
    duties.start()
    await asyncio.wait_for(began.wait(), 10)
    await asyncio.wait_for(duties.stop(), 5)
