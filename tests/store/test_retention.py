"""What is given up after its time and what is not: nothing that a log, a sample under way or a checkpoint needs."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection, Table, create_engine, select, update

from gateway.migrate import alembic_config
from gateway.store import Store, schema
from gateway.store.futures import Claim, Submission
from gateway.store.records import Future, Outcome, Run, Sampler, Session, StoredLoss
from gateway.store.retention import Batch
from gateway.store.samplers import insert_sampler
from gateway.store.sessions import Finish
from tests.store.conftest import a_run, a_session, an_operation
from tests.store.test_references import a_checkpoint, saved

_NUMBERS = itertools.count()
STATE = ("create_run", "forward_backward", "optim_step", "load_weights")


def now_(limit: int = 100) -> Batch:
    """Everything that is over already."""
    return Batch(time.time() + 1, limit)


def since(seconds: float, limit: int = 100) -> Batch:
    return Batch(time.time() - seconds, limit)


async def change(store: Store, table: Table, key: str, **values: Any) -> None:
    """Set columns of a row, as time would."""
    column = next(iter(table.primary_key))

    def work(connection: Connection, _: list[None]) -> list[None]:
        connection.execute(update(table).where(column == key).values(**values))
        return [None]

    await store.database.write(work, None)


async def keys(store: Store, table: Table) -> set[str]:
    column = next(iter(table.primary_key))
    return {row[0] for row in await store.database.rows(select(column))}


async def begun(store: Store, session: Session | None = None, **fields: Any) -> Run:
    run = a_run(session or await store.sessions.create(a_session()), **fields)
    create = an_operation(run, 0, "create_run")
    await store.futures.submit(Submission(create, b"create", run))
    await settle(store, create)
    return run


async def settle(store: Store, future: Future, **outcome: Any) -> None:
    await store.futures.claim(Claim((future.request_id,), 1))
    fields = {"result": b"result", **outcome}
    assert await store.futures.settle(Outcome(replace(future, epoch=1), **fields)) is not None


async def performed(store: Store, run: Run, seq_id: int, kind: str, **outcome: Any) -> Future:
    future = an_operation(run, seq_id, kind)
    await store.futures.submit(Submission(future, b"input"))
    await settle(store, future, **outcome)
    return future


async def a_sampler(store: Store, session: Session, **fields: Any) -> Sampler:
    number = next(_NUMBERS)
    values = {
        "sampler_id": f"{session.session_id}:sample:{number}",
        "owner": session.owner,
        "session_id": session.session_id,
        "engine": "e",
        "base_model": "m",
        "run_id": f"{session.session_id}:train:0",
        "path": None,
        "folder": f"checkpoints/s{number}",
        "created_at": time.time(),
        **fields,
    }
    sampler = Sampler(**values)

    def work(connection: Connection, _: list[None]) -> list[None]:
        assert insert_sampler(connection, sampler) is None
        return [None]

    await store.database.write(work, None)
    return sampler


async def a_sample(store: Store, sampler: Sampler, seq_id: int = 0) -> Future:
    future = Future(
        request_id=f"{sampler.sampler_id}:{seq_id}",
        owner=sampler.owner,
        engine="e",
        kind="sample",
        seq_id=seq_id,
        created_at=time.time(),
        sampler_id=sampler.sampler_id,
    )
    await store.futures.submit(Submission(future, b"prompt"))
    return future


async def test_inputs_stay_as_long_as_something_may_need_them(store: Store) -> None:
    """Of what changed state, for replays; of all else until there is an outcome."""
    run = await begun(store)
    kinds = ("forward_backward", "forward", "optim_step", "save_weights", "load_weights")
    for seq_id, kind in enumerate(kinds, start=1):
        await performed(store, run, seq_id, kind)
    await performed(store, run, 6, "forward_backward", result=None, error="bad", error_category="user")
    sampler = await a_sampler(store, await store.sessions.create(a_session()))
    waiting, drawn = await a_sample(store, sampler), await a_sample(store, sampler, 1)
    assert await store.futures.inputs([drawn.request_id]) == {drawn.request_id: b"prompt"}
    await settle(store, drawn)
    replayed = {f"{run.run_id}:{seq_id}" for seq_id in (0, 1, 3, 5)}
    assert await keys(store, schema.inputs) == {*replayed, waiting.request_id}


async def test_results_go_after_their_time_and_their_futures_stay(store: Store) -> None:
    run = await begun(store)
    old, young = await performed(store, run, 1, "forward"), await performed(store, run, 2, "forward")
    await change(store, schema.results, old.request_id, stored_at=time.time() - 100)
    assert await store.retention.delete_results(since(60)) == 1
    assert await store.retention.delete_results(since(60)) == 0
    assert await store.futures.result(old.request_id) is None
    assert await store.futures.result(young.request_id) == b"result"
    kept = await store.futures.get(old.request_id)
    assert kept is not None and kept.status == "done"


async def test_calls_that_no_log_needs_go_completely(store: Store) -> None:
    run = await begun(store)
    for seq_id, kind in enumerate((*STATE[1:], "forward", "save_weights"), start=1):
        await performed(store, run, seq_id, kind)
    await performed(store, run, 6, "optim_step", result=None, error="bad", error_category="user")
    waiting = an_operation(run, 7, "forward")
    await store.futures.submit(Submission(waiting, b"input"))
    sampler = await a_sampler(store, await store.sessions.create(a_session()))
    drawn, undrawn = await a_sample(store, sampler), await a_sample(store, sampler, 1)
    await settle(store, drawn)
    assert await store.retention.delete_futures(since(60)) == 0
    assert await store.retention.delete_futures(now_(limit=3)) == 3
    assert await store.retention.delete_futures(now_(limit=3)) == 1
    kept = {f"{run.run_id}:{seq_id}" for seq_id in (0, 1, 2, 3, 7)}
    assert await keys(store, schema.futures) == {*kept, undrawn.request_id}
    assert await keys(store, schema.inputs) == {*kept, undrawn.request_id}
    assert await keys(store, schema.results) == kept - {waiting.request_id}
    log = await store.futures.applied_to_run(run.run_id, -1, 99, STATE, 99)
    assert [future.seq_id for future in log] == [0, 1, 2, 3]


async def test_a_number_is_not_given_out_again_when_its_call_has_gone(store: Store) -> None:
    """SDKs that do not number get the next free one; a number below the log's end would never be performed."""
    run = await begun(store)
    await performed(store, run, 1, "optim_step")
    await performed(store, run, 2, "forward")
    assert await store.futures.next_number(run.run_id) == 3
    assert await store.retention.delete_futures(now_()) == 1
    assert await store.futures.next_number(run.run_id) == 3


@pytest.mark.parametrize(("limit", "batches"), [(4, [4, 3, 0]), (7, [7, 0, 0])])
async def test_the_log_of_a_run_that_has_ended_goes_in_batches(
    store: Store, limit: int, batches: list[int]
) -> None:
    session = await store.sessions.create(a_session())
    ended = await begun(store, session, origin_folder="checkpoints/begin")
    other = await begun(store)
    for run in (ended, other):
        for seq_id in range(1, 6):
            await performed(store, run, seq_id, "optim_step")
    assert await store.retention.delete_dead_logs(now_()) == 0
    await store.runs.unload(ended.run_id)
    late = an_operation(ended, 6, "optim_step")
    await store.futures.submit(Submission(late, b"input"))
    assert await store.retention.delete_dead_logs(now_()) == 0  # something of it is still to be performed
    await settle(store, late)
    assert await store.retention.delete_dead_logs(since(60)) == 0
    assert [await store.retention.delete_dead_logs(now_(limit=limit)) for _ in batches] == batches
    for table in (schema.futures, schema.inputs, schema.results):
        assert await keys(store, table) == {f"{other.run_id}:{seq_id}" for seq_id in range(6)}
    left = await store.runs.get(ended.run_id)
    assert left is not None and left.origin_folder is None and left.step == 6


async def test_silence_ends_a_session_and_work_or_a_heartbeat_does_not(store: Store) -> None:
    made = [await store.sessions.create(a_session(created_at=time.time() - 900)) for _ in range(5)]
    silent, beating, working, finished, young = made
    for session in made:
        await change(store, schema.sessions, session.session_id, heartbeat_at=time.time() - 900)
    await change(store, schema.sessions, young.session_id, created_at=time.time())
    await begun(store, working)
    await store.sessions.finish(Finish(finished.session_id, "errored", None))
    assert await store.sessions.beat(beating.session_id)
    assert await store.retention.end_silent_sessions(since(1000)) == []
    assert await store.retention.end_silent_sessions(since(600)) == [silent.session_id]
    assert await store.retention.end_silent_sessions(since(600)) == []
    over = await store.sessions.get(silent.session_id)
    assert over is not None and over.finish_reason == "expired" and over.finished_at is not None
    assert not await store.sessions.beat(silent.session_id)
    assert await store.sessions.get(silent.session_id) == over
    other = await store.sessions.get(finished.session_id)
    assert other is not None and other.finish_reason == "errored"


async def test_runs_are_idle_that_did_nothing_since_their_session_ended(store: Store) -> None:
    alive, over, busy = [await begun(store) for _ in range(3)]
    for run in (over, busy):
        await store.sessions.finish(Finish(run.session_id, "success", None))
    await performed(store, busy, 1, "optim_step")  # another process of its client still trains it
    runs = [run.run_id for run in (alive, over, busy)]
    assert await store.retention.idle_of(runs) == [over.run_id]
    assert await store.retention.idle_of([]) == []


async def test_unnamed_weights_go_some_time_after_their_session(store: Store) -> None:
    session = await store.sessions.create(a_session())
    unnamed = await a_sampler(store, session)
    shared = await a_sampler(store, session, folder="checkpoints/shared")
    base = await a_sampler(store, session, folder=None, run_id=None)
    await a_sampler(store, await store.sessions.create(a_session()), folder="checkpoints/shared")
    waiting = await a_sample(store, unnamed)
    assert (await store.retention.release_samplers(now_())).sampler_ids == []
    await store.sessions.finish(Finish(session.session_id, "success", None))
    assert (await store.retention.release_samplers(since(60))).sampler_ids == []
    released = await store.retention.release_samplers(now_())
    assert (released.sampler_ids, released.folders) == ([shared.sampler_id], [])
    await settle(store, waiting)
    released = await store.retention.release_samplers(now_())
    assert (released.sampler_ids, released.folders) == ([unnamed.sampler_id], [unnamed.folder])
    assert (await store.retention.release_samplers(now_())).sampler_ids == []
    for sampler in (unnamed, shared, base):
        stored = await store.samplers.get(sampler.sampler_id)
        assert stored is not None and (stored.released_at is None) == (sampler is base)


async def test_weights_of_a_deleted_checkpoint_go_some_time_after_the_sessions_of_their_samplers(
    store: Store,
) -> None:
    session = await store.sessions.create(a_session())
    kept, deleted, replaced = [await a_checkpoint(store) for _ in range(3)]
    samplers = {
        checkpoint.path: await a_sampler(store, session, path=checkpoint.path, folder=checkpoint.folder)
        for checkpoint in (kept, deleted, replaced)
    }
    later = await a_sampler(
        store, await store.sessions.create(a_session()), path=deleted.path, folder=deleted.folder
    )
    assert await store.checkpoints.delete(deleted.path) is None  # samplers have its files
    run = await store.runs.get(replaced.run_id)
    assert run is not None
    await saved(store, run, 2, replace(replaced, folder="checkpoints/newer"))
    assert (await store.retention.release_samplers(now_())).sampler_ids == []
    await store.sessions.finish(Finish(session.session_id, "success", None))
    assert (await store.retention.release_samplers(since(60))).sampler_ids == []
    released = await store.retention.release_samplers(now_())
    assert set(released.sampler_ids) == {samplers[each.path].sampler_id for each in (deleted, replaced)}
    assert released.folders == [replaced.folder]  # the other one's is sampled in a session that goes on
    await store.sessions.finish(Finish(later.session_id, "success", None))
    assert (await store.retention.release_samplers(now_())).folders == [deleted.folder]
    stored = await store.samplers.get(samplers[kept.path].sampler_id)
    assert stored is not None and stored.released_at is None


def test_samplers_whose_checkpoint_was_deleted_by_an_earlier_version_are_known(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0012")
        for line in (
            "INSERT INTO sessions (session_id, owner, user_metadata, tags, sdk_version, created_at, heartbeat_at) "
            "VALUES ('s', 'alice', '{}', '[]', '', 0, 0)",
            "INSERT INTO runs (run_id, owner, session_id, model_seq_id, engine, base_model, lora, optimizer, "
            "user_metadata, status, next_seq, step, pending_loss, pending_tokens, pending_seconds, created_at, "
            "last_request_at) VALUES ('r', 'alice', 's', 0, 'e', 'm', '{}', 'adamw', '{}', 'active', 1, 0, 0, 0, 0, "
            "0, 0)",
            "INSERT INTO checkpoints (path, owner, run_id, kind, name, folder, base_model, lora, has_optimizer, "
            "size_bytes, public, user_metadata, created_at) VALUES ('kept', 'alice', 'r', 'weights', 'n', 'f1', 'm', "
            "'{}', 0, 1, 0, '{}', 0)",
        ):
            connection.exec_driver_sql(line)
        for name, path, folder in (
            ("kept", "kept", "f1"),
            ("replaced", "kept", "f0"),
            ("deleted", "gone", "f2"),
            ("unnamed", None, "f3"),
            ("base", None, None),
        ):
            connection.exec_driver_sql(
                "INSERT INTO samplers (sampler_id, owner, session_id, engine, base_model, path, folder, created_at) "
                "VALUES (?, 'alice', 's', 'e', 'm', ?, ?, 0)",
                (name, path, folder),
            )
        command.upgrade(config, "head")
        gone = connection.exec_driver_sql(
            "SELECT sampler_id FROM samplers WHERE checkpoint_gone ORDER BY sampler_id"
        )
        assert gone.scalars().all() == ["deleted", "replaced"]
        command.downgrade(config, "0012")


async def test_inflight_weights_go_some_time_after_newer_ones(store: Store) -> None:
    session = await store.sessions.create(a_session())
    old, mid, new = [await a_sampler(store, session, inflight_seq=seq) for seq in (3, 5, 9)]
    snapshot = await a_sampler(store, session)
    for sampler, age in ((old, 300.0), (mid, 200.0), (new, 10.0), (snapshot, 300.0)):
        await change(store, schema.samplers, sampler.sampler_id, created_at=time.time() - age)
    await change(store, schema.samplers, snapshot.sampler_id, sampled_at=time.time() + 10)
    released = await store.retention.release_samplers(since(100))
    assert released.folders == [old.folder]  # `mid` was followed only ten seconds ago
    asked = await a_sample(store, new)  # it may have been sent while `mid` was the newest
    assert (await store.retention.release_samplers(now_())).folders == []
    await settle(store, asked)
    assert (await store.retention.release_samplers(now_())).folders == [mid.folder]
    newest = await store.samplers.newest_inflight(f"{session.session_id}:train:0")
    assert newest is not None and (newest.folder, newest.released_at) == (new.folder, None)


async def test_unnamed_weights_go_when_newer_ones_have_long_replaced_them_in_use(store: Store) -> None:
    """A loop that saves without a name after each step has one session for days."""
    session = await store.sessions.create(a_session())
    unused, used, asked, newest = [await a_sampler(store, session) for _ in range(4)]
    alone = await a_sampler(store, session, run_id="another:train:0")
    for sampler, age in ((unused, 500), (used, 490), (asked, 480), (newest, 200), (alone, 500)):
        await change(store, schema.samplers, sampler.sampler_id, created_at=time.time() - age)
    store.samplers.sampled(used.sampler_id)
    waiting = await a_sample(store, asked)
    assert (await store.retention.release_samplers(since(495))).folders == []  # no newer one is that old
    assert (await store.retention.release_samplers(since(100))).folders == [unused.folder]
    await settle(store, waiting)
    assert (await store.retention.release_samplers(since(100))).folders == [asked.folder]
    assert (await store.retention.release_samplers(since(100))).folders == []


async def test_the_last_use_is_written_once_a_minute(store: Store) -> None:
    sampler = await a_sampler(store, await store.sessions.create(a_session()))
    store.samplers.sampled(sampler.sampler_id)
    await store.database.barrier()
    first = await store.samplers.get(sampler.sampler_id)
    assert first is not None and first.sampled_at is not None and time.time() - first.sampled_at < 60
    store.samplers.sampled(sampler.sampler_id)
    await store.database.barrier()
    assert await store.samplers.get(sampler.sampler_id) == first


async def test_weights_without_a_checkpoint_count_in_their_owners_bytes(store: Store) -> None:
    session = await store.sessions.create(a_session())
    unnamed = await a_sampler(store, session, size_bytes=70)
    await a_sampler(store, session, folder=None, run_id=None)
    checkpoint = await a_checkpoint(store)
    mine = checkpoint.size_bytes
    for _ in range(2):  # both of the same files
        await a_sampler(store, session, path=checkpoint.path, folder=checkpoint.folder)
    assert await store.checkpoints.bytes_of("alice") == mine + 70
    assert await store.checkpoints.bytes_of("alice", unnamed.folder) == mine
    assert await store.checkpoints.bytes_of("bob") == 0
    await store.checkpoints.delete(checkpoint.path)  # samplers keep its files
    assert await store.checkpoints.bytes_of("alice") == mine + 70
    await store.sessions.finish(Finish(session.session_id, "success", None))
    await store.retention.release_samplers(now_())
    assert await store.checkpoints.bytes_of("alice") == 0


async def test_unnamed_weights_that_have_got_a_name_count_once(store: Store) -> None:
    checkpoint = await a_checkpoint(store)
    session = await store.sessions.create(a_session())
    await a_sampler(store, session, folder=checkpoint.folder, size_bytes=checkpoint.size_bytes)
    assert await store.checkpoints.bytes_of("alice") == checkpoint.size_bytes


async def test_losses_go_some_time_after_their_session(store: Store) -> None:
    sessions = [await store.sessions.create(a_session()) for _ in range(2)]
    losses = [
        StoredLoss(f"{each.session_id}:loss:0", each.owner, each.session_id, "n", b"x", None, 1.0)
        for each in sessions
    ]
    for loss in losses:
        await store.custom_losses.create(loss)
    await store.sessions.finish(Finish(sessions[0].session_id, "success", None))
    assert await store.retention.delete_losses(since(60)) == 0
    assert await store.retention.delete_losses(now_()) == 1
    assert await store.custom_losses.get(losses[0].loss_id) is None
    assert await store.custom_losses.get(losses[1].loss_id) == losses[1]
