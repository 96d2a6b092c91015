"""Numbers for the clients of a sampler, and its finished samples, as the database knows them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from gateway.completions import BLOCK, Completions, Poll
from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.records import Future, Outcome, Sampler, Settled
from tests.store.conftest import a_session


async def a_sampler(store: Store, name: str = "s:sample:0", owner: str = "alice") -> Sampler:
    session = await store.sessions.create(a_session(owner=owner))
    sampler = Sampler(
        name, owner, session.session_id, "e", "m", None, None, None, created_at=time.time() - 10
    )
    await store.samplers.create(sampler)
    return sampler


def a_sample(sampler: Sampler, seq_id: int) -> Future:
    return Future(
        request_id=f"{sampler.sampler_id}:{seq_id}",
        owner=sampler.owner,
        engine="e",
        kind="sample",
        seq_id=seq_id,
        created_at=time.time(),
        sampler_id=sampler.sampler_id,
    )


async def finish(store: Store, sampler: Sampler, seq_id: int, *, failed: bool = False) -> Future:
    """Accept a sample and settle it; the future as it is then."""
    future = a_sample(sampler, seq_id)
    await store.futures.submit(Submission(future, b"x"))
    await store.futures.claim(Claim((future.request_id,), 1))
    running = replace(future, epoch=1)
    outcome = Outcome(running, error="no", error_category="user") if failed else Outcome(running, result=b"y")
    settled = await store.futures.settle(outcome)
    assert isinstance(settled, Settled)
    return settled.future


def ids(found: list[Future]) -> list[int]:
    return [future.seq_id for future in found]


async def test_no_two_clients_get_the_same_number(store: Store) -> None:
    sampler, other = await a_sampler(store), await a_sampler(store, "s:sample:1")
    numbers = await asyncio.gather(*(store.samplers.join(sampler.sampler_id) for _ in range(20)))
    assert sorted(numbers) == list(range(1, 21))
    assert await store.samplers.join(other.sampler_id) == 1


async def test_finished_samples_of_one_client_are_found_in_order(store: Store) -> None:
    sampler, other = await a_sampler(store), await a_sampler(store, "s:sample:1")
    for seq_id in (2, 0, BLOCK, 1, 2 * BLOCK - 1, 2 * BLOCK):
        await finish(store, sampler, seq_id, failed=seq_id == 1)
    await finish(store, other, 3)
    await store.futures.submit(Submission(a_sample(sampler, 5), b"open"))
    first, second = range(BLOCK), range(BLOCK, 2 * BLOCK)
    assert ids(await store.futures.finished_of_sampler(sampler, first, since=0, limit=9)) == [2, 0, 1]
    assert ids(await store.futures.finished_of_sampler(sampler, first, since=0, limit=2)) == [0, 1]
    assert ids(await store.futures.finished_of_sampler(sampler, second, since=0, limit=9)) == [
        BLOCK,
        2 * BLOCK - 1,
    ]
    later = time.time() + 1
    assert await store.futures.finished_of_sampler(sampler, first, since=later, limit=9) == []


async def test_a_channel_tells_what_was_finished_before_and_after_it_was_opened(store: Store) -> None:
    sampler = await a_sampler(store)
    completions = Completions(store)
    await finish(store, sampler, 7)
    found = await completions.poll(Poll(sampler, 0, 0), 0)
    assert [(each.request_id, each.failed) for each in found] == [("s:sample:0:7", False)]
    waiting = asyncio.create_task(completions.poll(Poll(sampler, 0, found[-1].cursor), 30))
    await asyncio.sleep(0.01)
    completions.add(await finish(store, sampler, BLOCK))  # another client's
    completions.add(await finish(store, sampler, 8, failed=True))
    [told] = await waiting
    assert (told.request_id, told.failed) == ("s:sample:0:8", True)
    assert told.cursor > found[-1].cursor
    assert await completions.poll(Poll(sampler, 0, found[-1].cursor), 0) == [told]  # its answer was lost
    assert await completions.poll(Poll(sampler, 0, told.cursor), 0) == []


async def test_what_has_been_retrieved_is_not_told(store: Store) -> None:
    sampler = await a_sampler(store)
    completions = Completions(store)
    for seq_id in range(4):
        await finish(store, sampler, seq_id)
    retrieved = frozenset({"s:sample:0:1", "s:sample:0:2", "another's"})
    found = await completions.poll(Poll(sampler, 0, 0, retrieved), 0)
    assert [each.request_id for each in found] == ["s:sample:0:0", "s:sample:0:3"]


async def test_after_a_restart_the_queue_goes_on_where_the_client_is(store: Store) -> None:
    sampler = await a_sampler(store)
    before = Completions(store)
    for seq_id in range(3):
        await finish(store, sampler, seq_id)
    [first, *_] = await before.poll(Poll(sampler, 0, 0), 0)
    after = Completions(store)
    found = await after.poll(Poll(sampler, 0, first.cursor), 0)
    assert {"s:sample:0:1", "s:sample:0:2"} <= {each.request_id for each in found}
    cursors = [each.cursor for each in found]
    assert cursors == sorted(set(cursors))
    assert cursors[0] > first.cursor


async def test_a_client_whose_cursor_is_ahead_of_the_clock_misses_nothing(store: Store) -> None:
    sampler = await a_sampler(store)
    ahead = int((time.time() + 3600) * 1e6)
    await finish(store, sampler, 1)
    [told] = await Completions(store).poll(Poll(sampler, 0, ahead), 0)
    assert told.request_id == "s:sample:0:1"
    assert told.cursor > ahead


async def test_a_poll_ends_in_time_and_when_the_process_does(store: Store) -> None:
    sampler = await a_sampler(store)
    completions = Completions(store)
    started = time.monotonic()
    assert await completions.poll(Poll(sampler, 0, 0), 0.2) == []
    assert 0.15 < time.monotonic() - started < 2
    waiting = asyncio.create_task(completions.poll(Poll(sampler, 0, 0), 30))
    await asyncio.sleep(0.05)
    completions.answer_waiters()
    assert await asyncio.wait_for(waiting, 2) == []
    assert await asyncio.wait_for(completions.poll(Poll(sampler, 0, 0), 30), 2) == []


async def test_nothing_is_kept_for_those_who_do_not_poll(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, other = await a_sampler(store), await a_sampler(store, "s:sample:1")
    completions = Completions(store)
    completions.add(await finish(store, sampler, 0))
    assert completions._channels == {}
    await completions.poll(Poll(sampler, 0, 0), 0)
    assert len(completions._channels) == 1
    monkeypatch.setattr("gateway.completions._IDLE_S", -1.0)
    await completions.poll(Poll(other, 0, 0), 0)
    assert list(completions._channels) == [("s:sample:1", 0)]
    monkeypatch.setattr("gateway.completions._LONGEST_QUEUE", 2)
    for seq_id in range(3):
        completions.add(await finish(store, other, seq_id))
    assert completions._channels == {}
    told = await completions.poll(Poll(other, 0, 0), 0)
    assert [each.request_id for each in told] == ["s:sample:1:1", "s:sample:1:2"]
