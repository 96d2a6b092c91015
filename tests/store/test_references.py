"""A log or a sampler that is about to refer to a checkpoint's folder finds it still there, or is not accepted.

Deleting and referring are two transactions; whichever commits first decides, and no order of them leaves a reference
to a folder that has been given free.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from gateway.errors import NotFound
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Submission
from gateway.store.records import Checkpoint, CheckpointKind, Outcome, Run, Sampler
from tests.store.conftest import a_run, a_session, an_operation

_NUMBERS = itertools.count()


async def a_checkpoint(store: Store, **changes: object) -> Checkpoint:
    """A checkpoint of a run of its own, stored as a save's outcome stores it."""
    session = await store.sessions.create(a_session())
    run = a_run(session)
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"x", run))
    assert await store.futures.settle(Outcome(create, result=b"")) is not None
    number = next(_NUMBERS)
    checkpoint = Checkpoint(
        path=f"tinker://{run.run_id}/weights/n",
        owner="alice",
        run_id=run.run_id,
        kind=CheckpointKind.TRAINING,
        name="n",
        folder=f"checkpoints/r{number}",
        base_model="m",
        lora={"rank": 8},
        has_optimizer=True,
        size_bytes=10,
        public=False,
        user_metadata={},
        created_at=time.time(),
        expires_at=None,
    )
    return await saved(store, run, 1, replace(checkpoint, **changes))  # type: ignore[arg-type]


async def saved(store: Store, run: Run, seq_id: int, checkpoint: Checkpoint) -> Checkpoint:
    save = an_operation(run, seq_id, "save_weights", folder=checkpoint.folder)
    await store.futures.submit(Submission(save, b"x"))
    settled = await store.futures.settle(Outcome(save, result=b"", checkpoint=checkpoint, overwrite=True))
    assert settled is not None
    return checkpoint


async def begin_at(store: Store, checkpoint: Checkpoint) -> Run:
    session = await store.sessions.create(a_session())
    run = a_run(session, origin_path=checkpoint.path, origin_folder=checkpoint.folder)
    await store.futures.submit(
        Submission(an_operation(run, 0, "create_run"), b"x", run, checkpoint.reference)
    )
    return run


async def load(store: Store, checkpoint: Checkpoint) -> Run:
    session = await store.sessions.create(a_session())
    run = a_run(session)
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"x", run))
    operation = an_operation(run, 1, "load_weights", folder=checkpoint.folder)
    await store.futures.submit(Submission(operation, b"x", needs=checkpoint.reference))
    return run


async def sample_from(store: Store, checkpoint: Checkpoint) -> Sampler:
    session = await store.sessions.create(a_session())
    sampler = Sampler(
        sampler_id=f"{session.session_id}:sample:0",
        owner="alice",
        session_id=session.session_id,
        engine="e",
        base_model="m",
        run_id=checkpoint.run_id,
        path=checkpoint.path,
        folder=checkpoint.folder,
        created_at=1.0,
    )
    await store.samplers.create(sampler)
    return sampler


Refer = Callable[[Store, Checkpoint], Awaitable[Run | Sampler]]
WAYS: list[Refer] = [begin_at, load, sample_from]


@pytest.mark.parametrize("refer", WAYS)
async def test_what_has_gone_since_it_was_looked_up_is_not_accepted(store: Store, refer: Refer) -> None:
    """The interleaving of the hole: look up, somebody deletes, accept."""
    checkpoint = await a_checkpoint(store)
    assert await store.checkpoints.delete(checkpoint.path) == checkpoint.folder
    with pytest.raises(NotFound, match="deleted or replaced"):
        await refer(store, checkpoint)
    assert await store.runs.count("alice") == (1 if refer is not load else 2)
    loads = [f for f in await store.futures.page(limit=100) if f.kind == "load_weights"]
    sessions = await store.sessions.page(limit=9)
    samplers = [await store.samplers.of_session(session.session_id) for session in sessions]
    assert loads == []
    assert not any(samplers)


@pytest.mark.parametrize("refer", WAYS)
async def test_what_is_referred_to_keeps_its_folder(store: Store, refer: Refer) -> None:
    checkpoint = await a_checkpoint(store)
    await refer(store, checkpoint)
    assert await store.checkpoints.delete(checkpoint.path) is None


@pytest.mark.parametrize("refer", WAYS)
async def test_what_was_replaced_or_has_expired_is_gone_too(store: Store, refer: Refer) -> None:
    first = await a_checkpoint(store)
    run = await store.runs.get(first.run_id)
    assert run is not None
    await saved(store, run, 2, replace(first, folder="checkpoints/newer"))
    with pytest.raises(NotFound):
        await refer(store, first)
    expired = await a_checkpoint(store, expires_at=time.time() - 1)
    with pytest.raises(NotFound):
        await refer(store, expired)


async def test_a_refusal_leaves_its_neighbours_in_the_commit_alone(store: Store) -> None:
    """Twenty calls of one group commit; those that need what has gone are refused, and only those."""
    there, gone = await a_checkpoint(store), await a_checkpoint(store)
    await store.checkpoints.delete(gone.path)
    wanted = [there if number % 4 else gone for number in range(20)]
    answers = await asyncio.gather(*(begin_at(store, each) for each in wanted), return_exceptions=True)
    assert [isinstance(answer, NotFound) for answer in answers] == [each is gone for each in wanted]


async def test_a_repeated_call_is_the_first_one_whatever_became_of_its_checkpoint(store: Store) -> None:
    checkpoint = await a_checkpoint(store)
    run = await begin_at(store, checkpoint)
    await store.checkpoints.delete(checkpoint.path)
    again = Submission(an_operation(run, 0, "create_run"), b"x", run, checkpoint.reference)
    assert not await store.futures.submit(again)


@pytest.mark.parametrize("refer", WAYS)
async def test_in_one_process_either_the_reference_wins_or_the_deletion(store: Store, refer: Refer) -> None:
    for number in range(12):
        checkpoint = await a_checkpoint(store)
        calls: list[Awaitable[object]] = [
            refer(store, checkpoint),
            _later(store.checkpoints.delete(checkpoint.path), number),
        ]
        referred, freed = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(referred, NotFound) == (freed == checkpoint.folder), (referred, freed)


@pytest.mark.postgres
@pytest.mark.parametrize("refer", WAYS)
async def test_the_same_holds_between_two_processes(pg_url: str, refer: Refer) -> None:
    """Two writers of one database, whose transactions really overlap."""
    here, there = Store(Database(pg_url)), Store(Database(pg_url))
    for each in (here, there):
        each.start()
    try:
        for number in range(25):
            checkpoint = await a_checkpoint(here)
            calls: list[Awaitable[object]] = [
                refer(here, checkpoint),
                _later(there.checkpoints.delete(checkpoint.path), number % 6),
            ]
            referred, freed = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(referred, NotFound) == (freed == checkpoint.folder), (referred, freed)
    finally:
        for each in (here, there):
            await each.close()


async def _later(call: Awaitable[object], milliseconds: int) -> object:
    await asyncio.sleep(milliseconds / 1000)
    return await call
