"""Samples that move to another engine, and how many replicas there are to be."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.leases import LeaseRequest
from gateway.store.records import Future, FutureStatus, Outcome
from gateway.store.replicas import Change, Move, Wanted
from tests.store.conftest import a_run, a_session, an_operation


async def a_sample(store: Store, name: str, engine: str = "e") -> Future:
    future = Future(
        request_id=name,
        owner="alice",
        engine=engine,
        kind="sample",
        seq_id=0,
        created_at=time.time(),
        sampler_id=name,
    )
    await store.futures.submit(Submission(future, b"input"))
    return future


async def test_a_sample_that_has_moved_is_the_other_engines_alone(store: Store) -> None:
    sample = await a_sample(store, "s1")
    assert await store.futures.claim(Claim(("s1",), 7, "e")) == {"s1": b"input"}
    moved = await store.replicas.move(Move("s1", "e", "e-2"))
    assert moved is not None
    assert (moved.engine, moved.status, moved.epoch) == ("e-2", FutureStatus.QUEUED, None)
    assert moved == await store.futures.get("s1")
    # The one that it was taken from can neither claim it again nor store what it has drawn.
    assert await store.futures.claim(Claim(("s1",), 8, "e")) == {}
    await store.futures.claim_behind(Claim(("s1",), 8, "e"))
    late = Outcome(replace(sample, epoch=7), result=b"late")
    assert await store.futures.settle(late) is None
    # Its new one has it, although its own epochs are lower ones.
    assert await store.futures.claim(Claim(("s1",), 2, "e-2")) == {"s1": b"input"}
    settled = await store.futures.settle(Outcome(replace(moved, epoch=2), result=b"result"))
    assert settled is not None
    told = await store.futures.get("s1")
    assert told is not None
    assert (told.engine, told.status, told.epoch, told.attempts) == ("e-2", FutureStatus.DONE, 2, 2)
    assert await store.futures.result("s1") == b"result"


async def test_only_open_samples_of_the_engine_that_owes_them_move(store: Store) -> None:
    await a_sample(store, "s1")
    done = await a_sample(store, "s2")
    await store.futures.settle(Outcome(replace(done, epoch=1), result=b""))
    session = a_session()
    await store.sessions.create(session)
    run = a_run(session)
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"", run))
    assert await store.replicas.move(Move("s1", "other", "e-2")) is None
    assert await store.replicas.move(Move("s2", "e", "e-2")) is None
    assert await store.replicas.move(Move(create.request_id, create.engine, "e-2")) is None
    assert await store.replicas.move(Move("none", "e", "e-2")) is None
    assert [each.request_id for each in await store.futures.open_of_engine("e-2")] == []


async def test_orphans_are_samples_of_engines_that_nobody_has(store: Store) -> None:
    await a_sample(store, "s1", "e-2")
    await a_sample(store, "s2", "e-3")
    await a_sample(store, "s3", "e")
    lease = LeaseRequest("e-3", "me", 60)
    assert await store.leases.take(lease)
    assert [each.request_id for each in await store.replicas.orphans(["e-2", "e-3"], 9)] == ["s1"]
    await store.leases.give_back(lease)
    assert [each.request_id for each in await store.replicas.orphans(["e-2", "e-3"], 9)] == ["s1", "s2"]
    assert [each.request_id for each in await store.replicas.orphans(["e-2", "e-3"], 1)] == ["s1"]


async def test_of_two_that_decide_at_once_the_first_one_does(store: Store) -> None:
    assert await store.replicas.get("e") is None
    await store.replicas.change(Change("e", 1, 3))
    assert await store.replicas.get("e") == Wanted("e", 3)
    await store.replicas.change(Change("e", 1, 2))  # by who has not heard of it yet
    assert await store.replicas.get("e") == Wanted("e", 3)
    await store.replicas.change(Change("e", 3, 2))
    assert await store.replicas.get("e") == Wanted("e", 2)


@pytest.mark.parametrize("known", [False, True])
async def test_an_admins_bounds_stay_until_they_are_taken_back(store: Store, known: bool) -> None:
    if known:
        await store.replicas.change(Change("e", 1, 3))
    await store.replicas.put(Wanted("e", 2, 2, 4))
    assert await store.replicas.get("e") == Wanted("e", 2, 2, 4)
    await store.replicas.change(Change("e", 2, 4))
    assert await store.replicas.get("e") == Wanted("e", 4, 2, 4)
    await store.replicas.put(Wanted("e", 1))
    assert await store.replicas.get("e") == Wanted("e", 1)
