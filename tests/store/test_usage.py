"""What has been used and what has been done, as the database keeps it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.records import (
    ApiKey,
    AuditTopic,
    Checkpoint,
    CheckpointKind,
    Future,
    Outcome,
    Reference,
    Run,
    Sampler,
    Usage,
)
from tests.store.conftest import a_run, a_session, an_operation

HOUR = 3600


async def a_stored_run(store: Store, **changes: Any) -> Run:
    session = await store.sessions.create(a_session(**changes))
    run = a_run(session)
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"x", run))
    assert await store.futures.settle(Outcome(create, b"")) is not None
    return run


async def settle(store: Store, future: Future, **outcome: Any) -> bool:
    """Accept, claim and settle; whether it was stored."""
    await store.futures.submit(Submission(future, b"x"))
    await store.futures.claim(Claim((future.request_id,), 1))
    return await store.futures.settle(Outcome(replace(future, epoch=1), **outcome)) is not None


def a_checkpoint(run: Run, name: str = "one", **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "path": f"tinker://{run.run_id}/weights/{name}",
        "owner": run.owner,
        "run_id": run.run_id,
        "kind": CheckpointKind.TRAINING,
        "name": name,
        "folder": f"checkpoints/{name}-{time.monotonic_ns()}",
        "base_model": "m",
        "lora": {"rank": 8},
        "has_optimizer": True,
        "size_bytes": 1000,
        "public": False,
        "user_metadata": {},
        "created_at": time.time(),
        "expires_at": None,
    }
    return Checkpoint(**{**values, **changes})


async def save(
    store: Store, run: Run, seq_id: int, checkpoint: Checkpoint, *, overwrite: bool = False
) -> None:
    future = an_operation(run, seq_id, "save_weights")
    assert await settle(store, future, result=b"r", checkpoint=checkpoint, overwrite=overwrite)


async def events(store: Store, owner: str | None = "alice", topic: AuditTopic | None = None) -> list[str]:
    now = time.time()
    return [entry.event for entry in await store.audit.between(owner, now - 60, now + 60, topic)]


def this_hour() -> int:
    return int(time.time() // HOUR) * HOUR


async def test_counters_add_up_in_their_hour(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 1_000_000 * HOUR
    monkeypatch.setattr("gateway.store.usage.now", lambda: hour + 10.0)
    run = await a_stored_run(store, project_id="p")
    usage = Usage("alice", run.session_id, "m", training_tokens=5)
    for seq_id in (1, 2):
        assert await settle(store, an_operation(run, seq_id), result=b"r", usage=usage)
    monkeypatch.setattr("gateway.store.usage.now", lambda: hour + HOUR)
    assert await settle(
        store, an_operation(run, 3), result=b"r", usage=replace(usage, sampled_tokens=1, cached_tokens=2)
    )
    store.usage.add_behind(Usage("bob", "", "m", prefill_tokens=7))
    await store.sessions.beat(run.session_id)  # the transaction that it goes along with
    rows = await store.usage.rows(None, hour, hour + 2 * HOUR)
    assert [
        (r.bucket - hour, r.owner, r.session_id == run.session_id, r.training_tokens, r.prefill_tokens)
        for r in rows
    ] == [(0, "alice", True, 10, 0), (HOUR, "alice", True, 5, 0), (HOUR, "bob", False, 0, 7)]
    assert [(r.project_id, r.sampled_tokens, r.cached_tokens) for r in rows] == [
        ("p", 0, 0),
        ("p", 1, 2),
        (None, 0, 0),
    ]
    assert [r.owner for r in await store.usage.rows("bob", hour, hour + 2 * HOUR)] == ["bob"]
    assert await store.usage.rows("bob", hour, hour + HOUR) == []


async def test_what_was_not_stored_is_not_counted(store: Store) -> None:
    run = await a_stored_run(store)
    usage = Usage("alice", run.session_id, "m", training_tokens=5)
    future = an_operation(run, 1)
    assert await settle(store, future, error="no", error_category="user", usage=usage)
    assert await store.futures.settle(Outcome(replace(future, epoch=1), result=b"r", usage=usage)) is None
    late = an_operation(run, 2)
    await store.futures.submit(Submission(late, b"x"))
    await store.futures.claim(Claim((late.request_id,), 2))
    fenced = Outcome(replace(late, epoch=1), result=b"r", usage=usage)
    assert await store.futures.settle(fenced) is None  # of an engine whose epoch is over
    assert await store.usage.rows("alice", this_hour() - HOUR, this_hour() + HOUR) == []


async def test_bytes_are_stored_from_a_save_until_they_are_gone(store: Store) -> None:
    run = await a_stored_run(store, project_id="p")
    before = time.time()
    await save(store, run, 1, a_checkpoint(run, "kept"))
    await save(store, run, 2, a_checkpoint(run, "gone", size_bytes=20))
    await save(store, run, 3, a_checkpoint(run, "gone", size_bytes=30), overwrite=True)
    await store.checkpoints.delete(f"tinker://{run.run_id}/weights/gone")
    await save(store, run, 4, a_checkpoint(run, "fading", size_bytes=40, expires_at=before + 500))
    await store.checkpoints.set_expiry(f"tinker://{run.run_id}/weights/fading", before + 100)
    [kept, first, second, fading] = await store.usage.intervals("alice", before, before + 60)
    assert [each.size_bytes for each in (kept, first, second, fading)] == [1000, 20, 30, 40]
    assert (kept.until, fading.until) == (None, before + 100)
    assert first.until is not None
    assert before <= first.since <= first.until <= second.since
    assert {each.project_id for each in (kept, first, second, fading)} == {"p"}
    assert [each.size_bytes for each in await store.usage.intervals(None, before + 200, before + 300)] == [
        1000
    ]
    assert await store.usage.intervals("alice", before - 60, before - 30) == []
    assert await store.usage.intervals("bob", before, before + 60) == []
    [now] = await store.usage.stored_now("alice", None)
    assert (now.count, now.size_bytes, now.project_id) == (2, 1040, "p")
    assert await store.usage.stored_now("alice", "q") == []
    [row] = await store.usage.rows("alice", this_hour() - HOUR, this_hour() + HOUR)
    assert row.checkpoints == 4


async def test_what_is_done_with_a_checkpoint_is_written_down(store: Store) -> None:
    run = await a_stored_run(store)
    checkpoint = a_checkpoint(run)
    path = checkpoint.path
    await save(store, run, 1, checkpoint)
    for public in (True, True, False):
        await store.checkpoints.set_public(path, public)
    await store.checkpoints.set_expiry(path, time.time() + 100)
    await store.checkpoints.set_expiry("tinker://no/weights/one", None)
    await save(store, run, 2, a_checkpoint(run, expires_at=time.time() - 1), overwrite=True)
    await store.checkpoints.delete(path)
    await store.checkpoints.delete(path)
    assert await events(store, topic=AuditTopic.CHECKPOINTS) == [
        "checkpoint_created",
        "checkpoint_published",
        "checkpoint_unpublished",
        "checkpoint_ttl_set",
        "checkpoint_overwritten",
        "checkpoint_expired",
    ]
    assert (await events(store))[0] == "run_created"
    assert await events(store, "bob") == []
    [created, *_] = await store.audit.between("alice", 0, time.time() + 1, AuditTopic.CHECKPOINTS)
    assert created.details == {"tinker_path": path, "size_bytes": 1000}


async def test_who_takes_weights_is_told_to_both(store: Store) -> None:
    run = await a_stored_run(store)
    checkpoint = a_checkpoint(run, public=True)
    await save(store, run, 1, checkpoint)
    other = await a_stored_run(store, owner="bob")
    reference = Reference(checkpoint.path, checkpoint.folder)
    load = an_operation(other, 1, "load_weights", folder=checkpoint.folder)
    for _ in range(2):  # a repetition is the first one
        await store.futures.submit(Submission(load, b"x", needs=reference))
    sampler = Sampler(
        "z:sample:0",
        "alice",
        run.session_id,
        "e",
        "m",
        run.run_id,
        *(checkpoint.path, checkpoint.folder),
        1.0,
    )
    await store.samplers.create(sampler)
    for owner, expected in (
        ("alice", [("bob", "training"), ("alice", "sampling")]),
        ("bob", [("bob", "training")]),
    ):
        entries = await store.audit.between(owner, 0, time.time() + 1, AuditTopic.CHECKPOINTS)
        reads = [e.details for e in entries if e.event == "checkpoint_read"]
        assert [(e["reader"], e["purpose"]) for e in reads] == expected


async def test_runs_and_keys_are_written_down_once(store: Store) -> None:
    run = await a_stored_run(store)
    for _ in range(2):
        await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"x", run))
        await store.runs.unload(run.run_id)
    key, last = ApiKey("ab" * 32, "alice", False, "laptop", 1.0), ApiKey("cd" * 32, "bob", True, "", 2.0)
    for _ in range(2):
        await store.keys.add(key)
    await store.keys.add(last)
    assert await store.keys.remove_unless_last(key.key_hash)
    assert not await store.keys.remove_unless_last(last.key_hash)
    assert not await store.keys.remove_unless_last(key.key_hash)
    assert await store.keys.all() == [last]
    assert await events(store) == ["run_created", "run_unloaded", "api_key_created", "api_key_deleted"]
    assert await events(store, "bob") == ["api_key_created"]
    assert await events(store, None, AuditTopic.ORGANIZATIONS) == [
        "api_key_created",
        "api_key_created",
        "api_key_deleted",
    ]
    now = time.time()
    [created, _] = await store.audit.between("alice", now - 60, now + 60, AuditTopic.ORGANIZATIONS)
    assert created.details == {"key_id": int("ab" * 6, 16), "label": "laptop", "admin": False}
    assert await store.audit.between(None, now - 90, now - 60, None) == []
