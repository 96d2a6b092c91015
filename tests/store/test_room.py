"""Bounds of what waits, counted in the database: at gateways that lack the engine, or have not read its calls yet."""

from __future__ import annotations

import pytest

from gateway.dispatch.elsewhere import QueuesElsewhere
from gateway.errors import TooManyRequests
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.futures import Submission
from gateway.store.records import Future, Outcome, Run
from tests.store.conftest import a_run, a_session, an_operation

SETTINGS = Settings(max_queued_bytes=1000)


async def a_stored_run(store: Store) -> Run:
    run = a_run(await store.sessions.create(a_session()))
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"", run))
    await store.futures.settle(Outcome(an_operation(run, 0, "create_run"), result=b""))
    return run


def a_sample(run: Run, number: int, size: int, owner: str = "alice") -> Future:
    changes = {"run_id": None, "sampler_id": "x", "request_id": f"x:{number}", "owner": owner}
    return an_operation(run, number, "sample", input_bytes=size, **changes)


async def accept(store: Store, future: Future) -> Future:
    await store.futures.submit(Submission(future, bytes(future.input_bytes)))
    return future


async def test_bytes_of_operations_and_samples_are_counted_together(store: Store) -> None:
    run = await a_stored_run(store)
    await accept(store, an_operation(run, 1, input_bytes=600))
    await accept(store, a_sample(run, 1, 400))
    await accept(store, a_sample(run, 2, 5000, owner="bob"))
    queues = QueuesElsewhere(store, SETTINGS, "e")
    for future in (an_operation(run, 2), a_sample(run, 3, 1)):
        with pytest.raises(TooManyRequests, match="1000 bytes of calls of yours"):
            await queues.require_room(future)
    await QueuesElsewhere(store, SETTINGS, "another engine").require_room(an_operation(run, 2))


async def test_what_two_gateways_accept_counts_at_both(store: Store) -> None:
    run = await a_stored_run(store)
    here, there = (QueuesElsewhere(store, SETTINGS, "e") for _ in range(2))
    for number in (1, 2):
        future = an_operation(run, number, input_bytes=500)
        await here.require_room(future)
        await accept(store, future)
    with pytest.raises(TooManyRequests, match="max_queued_bytes"):
        await here.require_room(an_operation(run, 3))  # by what it has accepted since it counted
    with pytest.raises(TooManyRequests, match="max_queued_bytes"):
        await there.require_room(an_operation(run, 3))


async def test_what_has_its_outcome_makes_room(store: Store) -> None:
    run = await a_stored_run(store)
    first = await accept(store, an_operation(run, 1, input_bytes=2000))
    with pytest.raises(TooManyRequests):
        await QueuesElsewhere(store, SETTINGS, "e").require_room(an_operation(run, 2))
    await store.futures.settle(Outcome(first, result=b"done"))
    await QueuesElsewhere(store, SETTINGS, "e").require_room(an_operation(run, 2))


async def test_what_others_wait_for_is_taken_up_to_twice_the_bound(store: Store) -> None:
    run = await a_stored_run(store)
    await accept(store, an_operation(run, 9, input_bytes=1000))
    queues = QueuesElsewhere(store, SETTINGS, "e")
    with pytest.raises(TooManyRequests):
        await queues.require_room(an_operation(run, 10))
    for number in (3, 2):
        await queues.require_room(an_operation(run, number, input_bytes=500))
    with pytest.raises(TooManyRequests):
        await queues.require_room(an_operation(run, 1))
