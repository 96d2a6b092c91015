"""Futures: accepted once, claimed in one epoch, settled once, with everything that belongs to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.records import Checkpoint, CheckpointKind, Future, FutureStatus, Outcome, Run, RunStatus
from tests.store.conftest import a_run, a_session, an_operation


async def begun_run(store: Store) -> Run:
    session = await store.sessions.create(a_session())
    run = a_run(session)
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"create", run))
    return run


async def claim_and_settle(store: Store, future: Future, epoch: int = 1, **outcome: object) -> None:
    inputs = await store.futures.claim(Claim((future.request_id,), epoch))
    assert list(inputs) == [future.request_id]
    fields = {"result": b"result", **outcome}
    settled = await store.futures.settle(Outcome(replace(future, epoch=epoch), **fields))  # type: ignore[arg-type]
    assert settled is not None


async def test_a_submission_is_stored_once(store: Store) -> None:
    run = await begun_run(store)
    future = an_operation(run, 1)
    assert await store.futures.submit(Submission(future, b"first"))
    assert not await store.futures.submit(Submission(future, b"second"))
    assert await store.futures.inputs([future.request_id]) == {future.request_id: b"first"}


async def test_simultaneous_repetitions_are_stored_once(store: Store) -> None:
    run = await begun_run(store)
    future = an_operation(run, 1)
    await asyncio.gather(*(store.futures.submit(Submission(future, b"body")) for _ in range(20)))
    assert [entry.seq_id for entry in await store.futures.of_run_from(run.run_id, 0)] == [0, 1]


async def test_then_is_called_after_the_commit_even_when_the_caller_left(store: Store) -> None:
    run = await begun_run(store)
    heard: list[bool] = []
    task = asyncio.create_task(store.futures.submit(Submission(an_operation(run, 1), b"x"), heard.append))
    await asyncio.sleep(0)
    task.cancel()
    await store.futures.submit(Submission(an_operation(run, 2), b"x"))
    assert heard == [True]
    assert await store.futures.get(f"{run.run_id}:1") is not None


async def test_settling_stores_the_result_and_moves_the_run_on(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    await claim_and_settle(store, create)
    stored = await store.futures.get(create.request_id)
    assert stored is not None
    assert (stored.status, stored.attempts) == (FutureStatus.DONE, 1)
    assert await store.futures.result(create.request_id) == b"result"
    after = await store.runs.get(run.run_id)
    assert after is not None
    assert (after.status, after.next_seq) == (RunStatus.ACTIVE, 1)


async def test_a_failed_creation_fails_the_run(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    await claim_and_settle(store, create, result=None, error="rank is 0", error_category="user")
    after = await store.runs.get(run.run_id)
    assert after is not None
    assert after.status is RunStatus.FAILED


async def test_an_outcome_waits_for_those_before_it(store: Store) -> None:
    """One that could not be stored must not be overtaken: it would come too late then, and be lost."""
    run = await begun_run(store)
    create, *operations = [an_operation(run, 0, "create_run"), *(an_operation(run, n) for n in (1, 2, 3))]
    await claim_and_settle(store, create)
    for operation in operations:
        await store.futures.submit(Submission(operation, b"x"))
    first, second, third = operations
    assert await store.futures.settle(Outcome(second, b"r")) is None
    assert await store.futures.settle(Outcome(third, error="bad", error_category="user")) is None
    stored = await store.runs.get(run.run_id)
    assert stored is not None and stored.next_seq == 1
    together = [store.futures.settle(Outcome(each, b"r")) for each in (first, second, third)]
    assert None not in await asyncio.gather(*together)
    stored = await store.runs.get(run.run_id)
    assert stored is not None and stored.next_seq == 4


async def test_numbers_that_were_rejected_or_never_came_hold_nothing_up(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    rejected = an_operation(run, 1, status=FutureStatus.FAILED, error="bad", error_category="user")
    await store.futures.submit(Submission(rejected, b""))
    for seq_id in (2, 7):
        future = an_operation(run, seq_id)
        await store.futures.submit(Submission(future, b"x"))
        await claim_and_settle(store, future)
    late = an_operation(run, 5)
    await store.futures.submit(Submission(late, b"x"))
    assert await store.futures.settle(Outcome(late, error="late", error_category="user")) is not None
    stored = await store.runs.get(run.run_id)
    assert stored is not None and stored.next_seq == 8


async def test_an_outcome_of_an_older_epoch_is_refused(store: Store) -> None:
    run = await begun_run(store)
    create = an_operation(run, 0, "create_run")
    await store.futures.claim(Claim((create.request_id,), 1))
    await store.futures.claim(Claim((create.request_id,), 2))
    late = await store.futures.settle(Outcome(replace(create, epoch=1), result=b"late"))
    assert late is None
    assert await store.futures.result(create.request_id) is None
    valid = await store.futures.settle(Outcome(replace(create, epoch=2), result=b"valid"))
    assert valid is not None
    again = await store.futures.settle(Outcome(replace(create, epoch=2), result=b"again"))
    assert again is None
    assert await store.futures.result(create.request_id) == b"valid"


async def test_an_older_epoch_cannot_claim_what_a_newer_one_runs(store: Store) -> None:
    run = await begun_run(store)
    request_id = f"{run.run_id}:0"
    assert await store.futures.claim(Claim((request_id,), 2))
    assert await store.futures.claim(Claim((request_id,), 1)) == {}


async def test_the_schema_lets_only_one_operation_of_a_run_run(store: Store) -> None:
    run = await begun_run(store)
    await store.futures.submit(Submission(an_operation(run, 1), b"x"))
    await store.futures.claim(Claim((f"{run.run_id}:0",), 1))
    with pytest.raises(IntegrityError):
        await store.futures.claim(Claim((f"{run.run_id}:1",), 1))


async def test_settle_then_claim_needs_no_wait_in_between(store: Store) -> None:
    run = await begun_run(store)
    create, first = an_operation(run, 0, "create_run"), an_operation(run, 1)
    await store.futures.submit(Submission(first, b"first"))
    await store.futures.claim(Claim((create.request_id,), 1))
    settling = store.futures.settle(Outcome(replace(create, epoch=1), result=b"r"))
    assert await store.futures.claim(Claim((first.request_id,), 1)) == {first.request_id: b"first"}
    assert await settling is not None


async def test_one_failing_write_does_not_harm_its_neighbours(store: Store) -> None:
    run = await begun_run(store)
    await store.futures.submit(Submission(an_operation(run, 1), b"x"))
    await store.futures.claim(Claim((f"{run.run_id}:0",), 1))
    claim = store.futures.claim(Claim((f"{run.run_id}:1",), 1))
    others = [store.futures.submit(Submission(an_operation(run, seq), b"y")) for seq in (2, 3)]
    outcomes = await asyncio.gather(claim, *others, return_exceptions=True)
    assert isinstance(outcomes[0], IntegrityError)
    assert outcomes[1:] == [True, True]


async def test_metrics_of_a_step_are_the_sums_since_the_last(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    seq = 1
    for step in range(2):
        for loss in (3.0, 4.5):
            future = an_operation(run, seq)
            await store.futures.submit(Submission(future, b"x"))
            await claim_and_settle(store, future, summary={"loss": loss + step, "tokens": 10, "seconds": 0.5})
            seq += 1
        future = an_operation(run, seq, "optim_step")
        await store.futures.submit(Submission(future, b"x"))
        numbers = {"grad_norm": 2.5, "learning_rate": 1e-3, "seconds": 0.25}
        await claim_and_settle(store, future, summary=numbers)
        seq += 1
    steps = await store.runs.steps(run.run_id)
    assert [(s.step, s.seq_id, s.loss, s.tokens, s.seconds) for s in steps] == [
        (1, 3, 7.5, 20, 1.25),
        (2, 6, 9.5, 20, 1.25),
    ]
    assert (steps[0].grad_norm, steps[0].learning_rate) == (2.5, 1e-3)
    after = await store.runs.get(run.run_id)
    assert after is not None
    assert (after.step, after.pending_tokens) == (2, 0)


async def test_a_step_settled_together_with_its_passes_has_their_sums(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    kinds = ["forward_backward", "forward_backward", "optim_step", "forward_backward"]
    futures = [an_operation(run, seq, kind) for seq, kind in enumerate(kinds, start=1)]
    for future in futures:
        await store.futures.submit(Submission(future, b"x"))
    together = [
        store.futures.settle(Outcome(future, b"r", summary={"loss": 1.0 * future.seq_id, "tokens": 10}))
        for future in futures
    ]
    assert None not in await asyncio.gather(*together)
    steps = await store.runs.steps(run.run_id)
    assert [(s.step, s.seq_id, s.loss, s.tokens) for s in steps] == [(1, 3, 3.0, 20)]
    after = await store.runs.get(run.run_id)
    assert after is not None and (after.pending_loss, after.pending_tokens, after.next_seq) == (4.0, 10, 5)


async def test_a_failed_pass_is_not_in_the_metrics(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    future = an_operation(run, 1)
    await store.futures.submit(Submission(future, b"x"))
    summary = {"loss": 9.0, "tokens": 5}
    await claim_and_settle(store, future, result=None, error="bad", error_category="user", summary=summary)
    after = await store.runs.get(run.run_id)
    assert after is not None
    assert (after.pending_loss, after.next_seq) == (0.0, 2)


async def test_replay_sees_what_took_effect_in_order(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    kinds = ["forward_backward", "forward", "optim_step", "forward_backward"]
    for seq, kind in enumerate(kinds, start=1):
        future = an_operation(run, seq, kind)
        await store.futures.submit(Submission(future, b"x"))
        if seq == 4:
            await claim_and_settle(store, future, result=None, error="bad", error_category="user")
        else:
            await claim_and_settle(store, future)
    wanted = ["create_run", "forward_backward", "optim_step"]
    applied = await store.futures.applied_to_run(run.run_id, -1, 5, wanted, 10)
    assert [future.seq_id for future in applied] == [0, 1, 3]
    assert [f.seq_id for f in await store.futures.applied_to_run(run.run_id, 0, 3, wanted, 1)] == [1]


async def test_open_futures_of_an_engine_are_found_oldest_first(store: Store) -> None:
    run = await begun_run(store)
    for seq in (2, 1):
        await store.futures.submit(Submission(an_operation(run, seq), b"x"))
    await store.futures.claim(Claim((f"{run.run_id}:0",), 1))
    assert [future.seq_id for future in await store.futures.open_of_engine("e")] == [0, 2, 1]
    assert await store.futures.open_of_engine("other") == []


def a_checkpoint(run: Run, name: str, folder: str) -> Checkpoint:
    return Checkpoint(
        path=f"tinker://{run.run_id}/weights/{name}",
        owner=run.owner,
        run_id=run.run_id,
        kind=CheckpointKind.TRAINING,
        name=name,
        folder=folder,
        base_model="m",
        lora={},
        has_optimizer=True,
        size_bytes=7,
        public=False,
        user_metadata={},
        created_at=1.0,
        expires_at=None,
    )


async def save(store: Store, run: Run, seq: int, name: str, *, overwrite: bool = False) -> Future:
    future = an_operation(run, seq, "save_weights", folder=f"checkpoints/{seq}")
    await store.futures.submit(Submission(future, b"x"))
    await store.futures.claim(Claim((future.request_id,), 1))
    checkpoint = a_checkpoint(run, name, f"checkpoints/{seq}")
    outcome = Outcome(replace(future, epoch=1), result=b"r", checkpoint=checkpoint, overwrite=overwrite)
    settled = await store.futures.settle(outcome)
    assert settled is not None
    assert settled.orphaned_folder == (
        f"checkpoints/{seq}" if settled.future.error else settled.orphaned_folder
    )
    return settled.future


async def test_a_taken_name_fails_the_save_and_frees_its_folder(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    assert (await save(store, run, 1, "a")).status is FutureStatus.DONE
    second = await save(store, run, 2, "a")
    assert (second.status, second.error_category) == (FutureStatus.FAILED, "user")
    assert "'a' exists already" in (second.error or "")
    kept = await store.checkpoints.get(f"tinker://{run.run_id}/weights/a")
    assert kept is not None
    assert kept.folder == "checkpoints/1"


async def test_overwriting_replaces_the_checkpoint(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    await save(store, run, 1, "a")
    assert (await save(store, run, 2, "a", overwrite=True)).status is FutureStatus.DONE
    kept = await store.checkpoints.get(f"tinker://{run.run_id}/weights/a")
    assert kept is not None
    assert kept.folder == "checkpoints/2"


async def test_a_deleted_checkpoint_leaves_its_folder_to_the_log_that_began_at_it(store: Store) -> None:
    run = await begun_run(store)
    await claim_and_settle(store, an_operation(run, 0, "create_run"))
    await save(store, run, 1, "a")
    await save(store, run, 2, "b")
    session = await store.sessions.create(a_session())
    child = a_run(session, origin_folder="checkpoints/1")
    await store.futures.submit(Submission(an_operation(child, 0, "create_run"), b"x", child))
    assert await store.checkpoints.delete(f"tinker://{run.run_id}/weights/a") is None
    assert await store.checkpoints.delete(f"tinker://{run.run_id}/weights/b") == "checkpoints/2"
    assert await store.checkpoints.get(f"tinker://{run.run_id}/weights/a") is None


async def test_pages_go_on_where_the_last_one_ended(store: Store) -> None:
    run = await begun_run(store)
    for seq in range(1, 8):
        await store.futures.submit(Submission(an_operation(run, seq, created_at=1000.0 + seq // 3), b"x"))
    seen: list[str] = []
    before = None
    where = {"owner": "alice", "kind": "forward_backward"}
    while page := await store.futures.page(limit=3, before=before, where=where):
        seen += [future.request_id for future in page]
        before = (page[-1].created_at, page[-1].request_id)
    assert len(seen) == len(set(seen)) == 7
    assert await store.futures.page(limit=3, where={"owner": "bob"}) == []
