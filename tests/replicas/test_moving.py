"""Samples on their way from one replica's queue to another's, over a real store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gateway.dispatch import Dispatcher
from gateway.dispatch.blame import Blame
from gateway.dispatch.sampling import GIVEN_UP, SamplingLane
from gateway.engine_settings import EngineSettings
from gateway.errors import StoreUnavailable
from gateway.migrate import upgrade
from gateway.replicas import HandOver, Replicas
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission
from gateway.store.notices import Notice
from gateway.store.records import Future, FutureStatus
from gateway.store.replicas import Move
from gateway.supervisor import EngineState


class Queue:
    """A dispatcher whose engine takes nothing: samples wait in its lane."""

    def __init__(self, name: str, store: Store, settings: Settings) -> None:
        self.name = name
        self.ready = True
        self.supervisor = SimpleNamespace(holding=True, state=EngineState.READY)
        self.sampling = SamplingLane(store, settings, lambda settled: None, Blame(2))
        self.accept = self.sampling.accept

    @property
    def load(self) -> int:
        return self.sampling.open

    async def give_up(self, future: Future) -> None:
        self.sampling.give_up(future)


class Place:
    """Two replicas; the first has 40 samples, the second none."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.opened: list[Future] = []

        def make(engine: EngineSettings, blame: Blame, hand_over: HandOver | None) -> Dispatcher:
            return cast(Dispatcher, Queue(engine.name, store, settings))

        entry = EngineSettings(name="e", base_model="m", roles=("sample",), replicas=2)
        self.replicas = Replicas(entry, settings, store, make, lambda ended: None, self.opened.append)
        self.one, self.other = (cast(Queue, self.replicas.active[number]) for number in (1, 2))

    async def fill(self) -> None:
        for number in range(40):
            future = Future(
                request_id=f"s{number}",
                owner="alice",
                engine="e",
                kind="sample",
                seq_id=0,
                created_at=time.time(),
                sampler_id=f"s{number}",
            )
            await self.store.futures.submit(Submission(future, b"input"))
            self.one.accept(future, b"input")

    async def owed(self, engine: str) -> int:
        return len(await self.store.futures.open_of_engine(engine))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    place = Place(store, Settings(data_dir=tmp_path))
    await place.fill()
    yield place
    await store.close()


async def test_what_waits_for_a_busy_one_goes_half_to_an_idle_one(place: Place) -> None:
    await place.replicas._level()
    assert (place.one.sampling.waiting, place.other.sampling.waiting) == (20, 20)
    assert (await place.owed("e"), await place.owed("e-2")) == (20, 20)
    assert {(future.engine, future.open) for future in place.opened} == {("e-2", True)}
    await place.replicas._level()  # and then stays
    assert (place.one.sampling.waiting, place.other.sampling.waiting) == (20, 20)
    assert [body for _, body in place.other.sampling.take(20)] == [
        b"input"
    ] * 20  # they need not be read again


async def test_what_an_engine_draws_stays_and_one_that_is_not_ready_gets_nothing(place: Place) -> None:
    place.other.ready = False
    await place.replicas._level()
    assert (place.one.sampling.waiting, await place.owed("e-2")) == (40, 0)


async def test_a_sample_that_is_given_up_on_its_way_is_given_up_where_it_arrives(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = place.store.replicas.move

    async def slow(asked: Move, notice: Notice | None = None) -> Future | None:
        if asked.request_id == "s0":  # it is in no queue now
            future = await place.store.futures.get("s0")
            assert future is not None
            place.one.sampling.give_up(future)
        return await move(asked, notice)

    monkeypatch.setattr(place.store.replicas, "move", slow)
    await place.replicas._level()
    await place.store.database.barrier()
    told = await place.store.futures.get("s0")
    assert told is not None
    assert (told.status, told.error, told.engine) == (FutureStatus.FAILED, GIVEN_UP, "e-2")
    assert place.other.sampling.waiting == 19


async def test_what_cannot_be_moved_waits_where_it_was(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(asked: Move, notice: Notice | None = None) -> Future | None:
        raise StoreUnavailable("the database does not answer")

    monkeypatch.setattr(place.store.replicas, "move", refused)
    with pytest.raises(StoreUnavailable):
        await place.replicas._level()
    assert place.one.sampling.waiting == 40
    takers = [cast(Dispatcher, Queue(name, place.store, Settings())) for name in ("e-2", "e-3")]
    with pytest.raises(StoreUnavailable):
        await place.replicas._share_out(place.one.sampling.take(40), cast(Dispatcher, place.one), takers)
    assert place.one.sampling.waiting == 40  # both shares


@pytest.mark.parametrize("cut", [range(40), range(5)])
async def test_what_has_moved_when_the_connection_is_cut_is_drawn_by_who_owes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, cut: range
) -> None:
    """Nobody is told then whether it was stored; some of a call may have been told, in the transaction before."""
    move = place.store.replicas.move

    async def stored(asked: Move, notice: Notice | None = None) -> Future | None:
        moved = await move(asked, notice)
        if asked.request_id in {f"s{number}" for number in cut}:
            raise StoreUnavailable("the connection was cut")
        return moved

    monkeypatch.setattr(place.store.replicas, "move", stored)
    with pytest.raises(StoreUnavailable):
        await place.replicas._level()
    claimed = [await claimed_by(queue, place.store) for queue in (place.one, place.other)]
    assert [len(ids) for ids in claimed] == [20, 20]
    assert len(set.union(*claimed)) == 40


async def claimed_by(queue: Queue, store: Store) -> set[str]:
    """What a queue can claim of all that waits in it."""
    waiting = [future for future, _ in queue.sampling.take(40)]
    assert {future.engine for future in waiting} == {queue.name}
    claim = Claim(tuple(future.request_id for future in waiting), 1, queue.name)
    return set(await store.futures.claim(claim))
