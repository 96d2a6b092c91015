"""Sessions, runs, keys, samplers and leases."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.errors import Unprocessable
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Submission
from gateway.store.keys import _delete_unless_last
from gateway.store.leases import LeaseRequest
from gateway.store.records import ApiKey, Comparison, Outcome, RunStatus, Sampler
from gateway.store.sessions import Finish
from tests.store.conftest import a_run, a_session, an_operation


async def test_a_retried_session_is_the_first_one(store: Store) -> None:
    first = await store.sessions.create(a_session(idempotency_key="k"))
    again = await store.sessions.create(a_session(idempotency_key="k"))
    assert again.session_id == first.session_id
    other = await store.sessions.create(a_session(idempotency_key="k", owner="bob"))
    assert other.session_id != first.session_id


async def test_sessions_keep_what_they_were_given(store: Store) -> None:
    session = a_session(user_metadata={"a": [1, "ü"]}, tags=["x"], project_id="p", display_name="d")
    await store.sessions.create(session)
    assert await store.sessions.get(session.session_id) == session


async def test_the_first_finish_counts(store: Store) -> None:
    session = await store.sessions.create(a_session())
    await store.sessions.finish(Finish(session.session_id, "success", None))
    await store.sessions.finish(Finish(session.session_id, "errored", "later"))
    after = await store.sessions.get(session.session_id)
    assert after is not None
    assert (after.finish_reason, after.finish_detail) == ("success", None)
    assert after.finished_at is not None


async def test_a_heartbeat_is_noted(store: Store) -> None:
    session = await store.sessions.create(a_session(heartbeat_at=5.0))
    await store.sessions.beat(session.session_id)
    after = await store.sessions.get(session.session_id)
    assert after is not None
    assert after.heartbeat_at > 5.0


async def test_a_run_is_inserted_once_and_can_be_unloaded(store: Store) -> None:
    session = await store.sessions.create(a_session())
    run = a_run(session, user_metadata={"n": 1})
    for rank in (8, 16):
        changed = replace(run, lora={"rank": rank})
        await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"x", changed))
    stored = await store.runs.get(run.run_id)
    assert stored == run
    await store.runs.unload(run.run_id)
    after = await store.runs.get(run.run_id)
    assert after is not None
    assert after.status is RunStatus.UNLOADED
    assert [r.run_id for r in await store.runs.of_session(session.session_id)] == [run.run_id]
    assert await store.runs.count("alice") == 1
    assert await store.runs.page(limit=5, where={"owner": "bob"}) == []


async def test_a_run_keeps_its_newest_comparison(store: Store) -> None:
    session = await store.sessions.create(a_session())
    run = a_run(session)
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"x", run))
    first, newest = Comparison(3, 0.25, 0.5, 1.0), Comparison(4, 0.125, 1.5, 2.0)
    for comparison in (first, newest):
        await store.runs.record_comparison(run.run_id, "alice", comparison)
    await store.runs.record_comparison(run.run_id, "bob", first)  # of a public checkpoint of alice's
    assert await store.runs.get(run.run_id) == replace(run, comparison=newest)
    await store.runs.record_comparison(run.run_id, "alice", Comparison(4, float("nan"), float("inf"), 3.0))
    stored = await store.runs.get(run.run_id)
    assert stored is not None and stored.comparison is not None
    assert math.isnan(stored.comparison.mean) and math.isnan(stored.comparison.largest)


async def test_keys_come_and_go(store: Store) -> None:
    key = ApiKey("f" * 64, "alice", False, "laptop", 1.0)
    await store.keys.add(key)
    assert await store.keys.all() == [key]
    assert await store.keys.remove(key.key_hash)
    assert not await store.keys.remove(key.key_hash)
    assert await store.keys.all() == []


async def test_the_last_key_stays(store: Store) -> None:
    keys = [ApiKey(letter * 64, "alice", False, letter, 1.0) for letter in "ab"]
    for key in keys:
        await store.keys.add(key)
    answers = [store.keys.remove_unless_last(key.key_hash) for key in keys]
    assert await asyncio.gather(*answers) == [True, False]  # in one transaction
    assert not await store.keys.remove_unless_last("c" * 64)
    assert await store.keys.all() == keys[1:]


@pytest.mark.postgres
async def test_of_two_gateways_that_remove_a_key_each_one_finds_the_last(pg_url: str) -> None:
    stores = [Store(Database(pg_url)) for _ in range(2)]
    keys = [ApiKey(letter * 64, "alice", False, letter, 1.0) for letter in "ab"]
    for store in stores:
        store.start()
    for key in keys:
        await stores[0].keys.add(key)
    engine = create_async_engine(pg_url)
    async with engine.begin() as connection:
        assert await connection.run_sync(_delete_unless_last, [keys[0].key_hash]) == [True]
        other = asyncio.ensure_future(stores[1].keys.remove_unless_last(keys[1].key_hash))
        done, _ = await asyncio.wait({other}, timeout=0.3)
        assert not done  # it waits for what becomes of the first
    assert not await other
    assert await stores[0].keys.all() == keys[1:]
    await engine.dispose()
    for store in stores:
        await store.close()


async def test_a_sampler_never_changes(store: Store) -> None:
    """Sent again it is the first one; other weights under its number are refused, alone or in one commit."""
    session = await store.sessions.create(a_session())
    sampler = Sampler("p:sample:0", "alice", session.session_id, "e", "m", None, None, None, 1.0)
    path = "tinker://p:train:0/sampler_weights/x"
    others = [
        (replace(sampler, base_model="other"), "base_model"),
        (replace(sampler, run_id="p:train:0", path=path, folder="checkpoints/2"), "model_path"),
    ]
    calls = [store.samplers.create(each) for each in (sampler, replace(sampler, created_at=2.0))]
    calls += [store.samplers.create(other) for other, _ in others]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers[:2] == [None, None]
    for (other, field), refusal in zip(others, answers[2:], strict=True):
        assert isinstance(refusal, Unprocessable) and refusal.param == field
        with pytest.raises(Unprocessable, match=f"{field}.*sampler 0 .* base model 'm'"):
            await store.samplers.create(other)
    assert await store.samplers.get("p:sample:0") == sampler
    assert await store.samplers.of_session(session.session_id) == [sampler]


async def test_a_save_under_the_number_of_another_sampler_fails_and_frees_its_folder(store: Store) -> None:
    session = await store.sessions.create(a_session())
    run = a_run(session)
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"x", run))
    assert await store.futures.settle(Outcome(create, b"")) is not None
    saves = [an_operation(run, n, "save_weights", folder=f"checkpoints/u{n}") for n in (1, 2, 3)]
    for save in saves:
        await store.futures.submit(Submission(save, b"x"))
    base = Sampler("p:sample:0", "alice", session.session_id, "e", "m", None, None, None, 1.0)
    await store.samplers.create(base)
    ids = ["p:sample:0", "p:sample:1", "p:sample:1"]
    outcomes = [
        Outcome(save, b"", sampler=replace(base, sampler_id=name, run_id=run.run_id, folder=save.folder))
        for name, save in zip(ids, saves, strict=True)
    ]
    settled = await asyncio.gather(*(store.futures.settle(outcome) for outcome in outcomes))
    found = []
    for each in settled:
        assert each is not None
        found.append((each.future.status, each.future.error_category, each.result, each.orphaned_folder))
    assert found == [
        ("failed", "user", None, "checkpoints/u1"),
        ("done", None, b"", None),
        ("failed", "user", None, "checkpoints/u3"),
    ]
    stored = [await store.futures.get(save.request_id) for save in saves]
    assert [future is not None and future.status for future in stored] == ["failed", "done", "failed"]
    assert stored[2] is not None and "sampling_session_seq_id is 1" in (stored[2].error or "")
    assert await store.samplers.of_session(session.session_id) == [base, outcomes[1].sampler]


async def test_a_lease_has_one_holder_and_each_start_a_higher_epoch(store: Store) -> None:
    mine = LeaseRequest("e", "me", 60)
    yours = LeaseRequest("e", "you", 60)
    assert await store.leases.take(mine) == 1
    assert await store.leases.take(yours) is None
    assert await store.leases.take(mine) == 2
    assert await store.leases.renew(mine)
    assert not await store.leases.renew(yours)


async def test_an_expired_lease_can_be_taken(store: Store) -> None:
    assert await store.leases.take(LeaseRequest("e", "me", -1)) == 1
    assert await store.leases.take(LeaseRequest("e", "you", 60)) == 2
    assert not await store.leases.renew(LeaseRequest("e", "me", 60))
