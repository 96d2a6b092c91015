"""Snapshots in the database: who may register one, which are kept, what is pruned behind them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from gateway.pacing import Pace
from gateway.snapshot_duties import prune_inputs
from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.leases import LeaseRequest
from gateway.store.records import Outcome, Run, RunStatus
from gateway.store.snapshots import Registration
from tests.store.conftest import a_run, a_session, an_operation

EPOCH = 1


async def begin(store: Store, steps: int = 0) -> Run:
    """A run with so many steps of one pass each, all settled: passes are odd, steps even."""
    run = a_run(await store.sessions.create(a_session()))
    await operate(store, run, 0, "create_run")
    for number in range(1, steps + 1):
        await operate(store, run, 2 * number - 1, "forward_backward", loss=float(number), tokens=1.0)
        await operate(store, run, 2 * number, "optim_step", grad_norm=0.5)
    return run


async def operate(store: Store, run: Run, seq: int, kind: str, **summary: float) -> None:
    future = an_operation(run, seq, kind)
    await store.futures.submit(Submission(future, b"x" * 10, run if kind == "create_run" else None))
    await store.futures.claim(Claim((future.request_id,), EPOCH))
    outcome = Outcome(replace(future, epoch=EPOCH), result=b"r", digest=b"d", summary=summary)
    assert await store.futures.settle(outcome) is not None


async def epoch_of(store: Store) -> int:
    """The engine's epoch from now on, ours."""
    epoch = await store.leases.take(LeaseRequest("e", "us", 60))
    assert epoch is not None
    return epoch


async def register(store: Store, run: Run, seq: int, epoch: int, **changes: Any) -> bool:
    values: dict[str, Any] = {
        "folder": f"snapshots/{run.run_id}-{seq}",
        "checksums": {"a": "0f"},
        "size_bytes": 7,
    }
    return await store.snapshots.register(
        Registration(run.run_id, seq, engine="e", epoch=epoch, **{**values, **changes})
    )


async def kept(store: Store, run: Run) -> list[int]:
    return [snapshot.seq_id for snapshot in await store.snapshots.of_run(run.run_id)]


async def inputs(store: Store, run: Run, last: int) -> list[int]:
    """Numbers of the run's operations whose inputs are there."""
    there = [seq for seq in range(last + 1) if await store.futures.input_at(run.run_id, seq) is not None]
    assert len(await store.futures.inputs(f"{run.run_id}:{seq}" for seq in range(last + 1))) == len(there)
    return there


async def test_a_snapshot_is_what_was_registered(store: Store) -> None:
    run = await begin(store, steps=3)
    epoch = await epoch_of(store)
    before = time.time()
    assert await register(store, run, 4, epoch)
    [snapshot] = await store.snapshots.of_run(run.run_id)
    assert (snapshot.seq_id, snapshot.step, snapshot.folder) == (4, 2, f"snapshots/{run.run_id}-4")
    assert (snapshot.checksums, snapshot.size_bytes, snapshot.damage) == ({"a": "0f"}, 7, None)
    assert before <= snapshot.created_at <= time.time()
    assert await store.snapshots.known([snapshot.folder, "snapshots/other"]) == {snapshot.folder}


async def test_only_the_engines_owner_registers(store: Store) -> None:
    run = await begin(store, steps=1)
    old = await epoch_of(store)
    new = await epoch_of(store)
    assert not await register(store, run, 2, old)
    assert await kept(store, run) == []
    assert await register(store, run, 2, new)


async def test_only_what_was_settled_is_registered(store: Store) -> None:
    run = await begin(store, steps=1)
    epoch = await epoch_of(store)
    open_one = an_operation(run, 3, "optim_step")
    await store.futures.submit(Submission(open_one, b"x"))
    for seq in (3, 4):  # not settled; not there
        assert not await register(store, run, seq, epoch)
    await store.futures.claim(Claim((open_one.request_id,), epoch))
    await store.futures.settle(Outcome(replace(open_one, epoch=epoch), error="no", error_category="user"))
    assert not await register(store, run, 3, epoch)  # it failed: it changed nothing
    assert await kept(store, run) == []


async def test_the_newest_two_are_kept_and_older_ones_go_later(store: Store) -> None:
    run, other = await begin(store, steps=5), await begin(store, steps=5)
    epoch = await epoch_of(store)
    for seq in (2, 4, 6):
        await register(store, run, seq, epoch)
        await register(store, other, seq, epoch)
    assert await kept(store, run) == [6, 4]
    first = f"snapshots/{run.run_id}-2"
    assert await store.snapshots.known([first]) == {first}  # a backup may name it
    assert await store.snapshots.forget(100, superseded_for=60) == []
    assert set(await store.snapshots.forget(100, superseded_for=-1)) == {
        first,
        f"snapshots/{other.run_id}-2",
    }
    assert await store.snapshots.known([first]) == set()
    assert await kept(store, other) == [6, 4]


async def test_a_damaged_one_does_not_count(store: Store) -> None:
    run = await begin(store, steps=6)
    epoch = await epoch_of(store)
    await register(store, run, 2, epoch)
    await register(store, run, 4, epoch)
    await store.snapshots.set_damage(f"snapshots/{run.run_id}-4", "gone")
    await register(store, run, 6, epoch)
    assert await kept(store, run) == [6, 4, 2]
    assert [each.damage for each in await store.snapshots.of_run(run.run_id)] == [None, "gone", None]
    await prune_inputs(store, Pace())
    assert await inputs(store, run, 12) == [0, *range(3, 13)]  # behind the one after operation 2
    await register(store, run, 8, epoch)
    assert await kept(store, run) == [8, 6]


async def test_a_snapshot_that_is_taken_again_replaces_the_damaged_one(store: Store) -> None:
    run = await begin(store, steps=2)
    epoch = await epoch_of(store)
    await register(store, run, 4, epoch)
    await store.snapshots.set_damage(f"snapshots/{run.run_id}-4", "cut short")
    await register(store, run, 4, epoch, folder="snapshots/again")
    [snapshot] = await store.snapshots.of_run(run.run_id)
    assert (snapshot.folder, snapshot.damage) == ("snapshots/again", None)


async def test_inputs_are_pruned_behind_the_older_of_two(store: Store) -> None:
    run, other = await begin(store, steps=8), await begin(store, steps=8)
    epoch = await epoch_of(store)
    await register(store, run, 10, epoch)
    assert await prune_inputs(store, Pace()) == 0
    assert await inputs(store, run, 16) == list(range(17))  # one alone may be damaged
    await register(store, run, 14, epoch)
    assert await prune_inputs(store, Pace()) == 10
    assert await inputs(store, run, 16) == [0, *range(11, 17)]  # creation stays
    assert await inputs(store, other, 16) == list(range(17))
    found = await store.runs.get(run.run_id)
    assert found is not None and found.pruned_seq == 10
    assert await prune_inputs(store, Pace()) == 0
    await register(store, run, 16, epoch)
    assert await prune_inputs(store, Pace()) == 4
    assert await inputs(store, run, 16) == [0, 15, 16]


async def test_pruning_goes_in_small_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.snapshots._INPUTS_AT_A_TIME", 3)
    run = await begin(store, steps=5)
    epoch = await epoch_of(store)
    await register(store, run, 8, epoch)
    await register(store, run, 10, epoch)
    assert await store.snapshots.prunable(10) == [run.run_id]
    assert [await store.snapshots.prune(run.run_id) for _ in range(4)] == [3, 3, 2, 0]
    assert await inputs(store, run, 10) == [0, 9, 10]
    assert await store.snapshots.prunable(10) == []


async def test_damage_that_is_found_meanwhile_stops_pruning(store: Store) -> None:
    run = await begin(store, steps=5)
    epoch = await epoch_of(store)
    await register(store, run, 4, epoch)
    await register(store, run, 8, epoch)
    assert await store.snapshots.prunable(10) == [run.run_id]
    await store.snapshots.set_damage(f"snapshots/{run.run_id}-4", "gone")
    assert await store.snapshots.prune(run.run_id) == 0
    assert await inputs(store, run, 10) == list(range(11))


async def test_snapshots_of_ended_runs_are_forgotten_once_nothing_waits(store: Store) -> None:
    run, alive = await begin(store, steps=2), await begin(store, steps=2)
    epoch = await epoch_of(store)
    for each in (run, alive):
        await register(store, each, 4, epoch)
    waiting = an_operation(run, 5, "optim_step")
    await store.futures.submit(Submission(waiting, b"x"))
    await store.runs.unload(run.run_id)
    assert await store.snapshots.forget(10, superseded_for=60) == []
    await store.futures.claim(Claim((waiting.request_id,), epoch))
    await store.futures.settle(Outcome(replace(waiting, epoch=epoch), result=b"r"))
    assert await store.snapshots.forget(10, superseded_for=60) == [f"snapshots/{run.run_id}-4"]
    assert await kept(store, alive) == [4]


async def test_what_a_replay_is_compared_with_is_stored(store: Store) -> None:
    run = await begin(store, steps=1)
    found = {future.seq_id: future for future in await store.futures.of_run_from(run.run_id, 0)}
    assert [found[seq].measure for seq in (0, 1, 2)] == [None, 1.0, 0.5]
    assert {future.result_digest for future in found.values()} == {b"d"}
    await store.runs.record_difference(run.run_id, "step 2")
    changed = await store.runs.get(run.run_id)
    assert changed is not None
    assert (changed.replay_difference, changed.status) == ("step 2", RunStatus.ACTIVE)
