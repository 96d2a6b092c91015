"""The lane of the runs over an engine that has room for few of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from engines.messages import Failure, Outcome, Performed, RunAddress
from gateway.dispatch.quarantine import Quarantine
from gateway.engine_process import EngineProcess
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.leases import LeaseRequest
from gateway.store.records import FutureStatus
from tests.dispatch.snapshotting import SIZE, SmallEngine
from tests.dispatch.test_training import Place


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Place]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    assert await store.leases.take(LeaseRequest("e", "us", 600)) == 1
    place = Place(store, Settings(data_dir=tmp_path))
    place.engine = SmallEngine(places=2)
    feeding = asyncio.create_task(place.lane.feed(cast(EngineProcess, place.engine), Quarantine()))
    yield place
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding
    place.lane.snapshots.reset()
    await store.close()


def engine_of(place: Place) -> SmallEngine:
    assert isinstance(place.engine, SmallEngine)
    return place.engine


async def test_many_runs_pass_through_few_places_each_whole_and_in_order(small: Place) -> None:
    runs = [await small.begin(f"owner-{i % 3}") for i in range(7)]
    kinds = {seq: "forward_backward" if seq % 2 else "optim_step" for seq in range(1, 9)}
    futures = await asyncio.gather(
        *(small.submit(run, seq, kind) for seq, kind in kinds.items() for run in runs)
    )
    for future in futures:
        assert (await small.outcome(future)).status is FutureStatus.DONE
    engine = engine_of(small)
    assert engine.most == 2
    for run in runs:
        *_, last = engine.history[run.run_id]
        assert last == [*range(9)]
        assert all(life == [*range(len(life))] for life in engine.history[run.run_id])
    assert small.lane.residency.evictions > 0
    assert len(small.lane.residency) == len(engine.runs) <= 2


async def test_each_operation_is_performed_once_and_only_replayed_after_that(small: Place) -> None:
    runs = [await small.begin("alice") for _ in range(4)]
    for seq in (1, 2, 3):
        for future in [await small.submit(run, seq) for run in runs]:
            assert (await small.outcome(future)).status is FutureStatus.DONE
    engine = engine_of(small)
    first_times = [
        (address.run_id, address.seq_id)
        for kind, addresses, replay in engine.calls
        for address in addresses
        if not replay and kind != "create_run"
    ]
    assert len(first_times) == len(set(first_times)) == 12


async def test_idle_runs_make_room_at_once(small: Place) -> None:
    first, second = await small.begin("alice"), await small.begin("bob")
    for run in (first, second):
        await small.outcome(await small.submit(run, 1))
    await asyncio.sleep(0.05)
    third = await small.begin("carol")
    async with asyncio.timeout(2):
        await small.outcome(await small.submit(third, 1))
    assert engine_of(small).dropped == [first.run_id]


async def test_a_run_that_waits_for_a_place_says_so(small: Place) -> None:
    engine = engine_of(small)
    engine.pause_s = 0.05
    runs = [await small.begin(owner) for owner in ("alice", "bob", "carol")]
    held = [await small.submit(run, seq) for seq in range(1, 9) for run in runs]
    said = set()
    while len(small.settled) < 3 + len(held):
        standings = [small.lane.standing(each) for each in held if each.request_id not in small.settled]
        said |= {standing.reason for standing in standings if standing.paused}
        await asyncio.sleep(0.02)
    assert said == {"its run waits for a place in the engine's memory, which others have now"}


async def test_a_run_for_which_an_empty_engine_has_no_room_fails(small: Place) -> None:
    engine_of(small).places = 0
    run = await small.begin("alice")
    future = await small.submit(run, 1)
    failed = await small.outcome(future)
    assert failed.status is FutureStatus.FAILED
    created = next(s.future for s in small.settled.values() if s.future.kind == "create_run")
    assert created.error_category == "server"
    assert "no memory for the run, 100 bytes, though no other run is in it" in (created.error or "")


async def test_an_engine_that_has_less_than_it_said_is_filled_as_far_as_it_goes(small: Place) -> None:
    engine = engine_of(small)
    engine.places = 1
    runs = [await small.begin("alice") for _ in range(3)]
    for seq in (1, 2):
        for run in runs:
            assert (await small.outcome(await small.submit(run, seq))).status is FutureStatus.DONE
    assert engine.most == 1
    assert small.lane.residency.limit == 2 * SIZE - 1


async def test_what_an_engine_still_holds_from_before_is_dropped(small: Place, tmp_path: Path) -> None:
    """Memory was rebuilt from the database while the engine lived on."""
    runs = [await small.begin("alice") for _ in range(2)]
    for run in runs:
        await small.outcome(await small.submit(run, 1))
    small.lane.reset()
    feeding = asyncio.create_task(small.lane.feed(cast(EngineProcess, small.engine), Quarantine()))
    await asyncio.sleep(0.05)
    assert sorted(engine_of(small).dropped) == sorted(run.run_id for run in runs)
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding


async def test_a_restoration_that_fails_leaves_nothing_in_the_engine(
    small: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [await small.begin("alice") for _ in range(3)]
    for run in runs:
        await small.outcome(await small.submit(run, 1))
    engine = engine_of(small)
    gone = next(run for run in runs if run.run_id not in engine.runs)
    perform = engine.perform

    async def fails_at_one(
        kind: str, addresses: Sequence[RunAddress], bodies: Sequence[bytes], *, replay: bool = False
    ) -> tuple[Performed, list[bytes]]:
        if replay and addresses[0].seq_id == 1:
            return Performed(0, [Outcome(Failure("user", "it cannot be applied"))]), []
        return await perform(kind, addresses, bodies, replay=replay)

    monkeypatch.setattr(engine, "perform", fails_at_one)
    assert (await small.outcome(await small.submit(gone, 2))).status is FutureStatus.FAILED
    assert gone.run_id not in engine.runs
    assert small.lane.residency.used == SIZE * len(engine.runs)
