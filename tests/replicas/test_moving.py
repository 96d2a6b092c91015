"""Samples on their way from one replica's queue to another's, over a real store."""

from __future__ import annotations

import asyncio
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
from gateway.fleet import Fleet
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
        self.supervisor = SimpleNamespace(
            holding=True, state=EngineState.READY, start=lambda: None, stop=self._stop
        )
        self.stopped = False
        self.sampling = SamplingLane(store, settings, lambda settled: None, Blame(2))
        self.accept = self.sampling.accept

    @property
    def load(self) -> int:
        return self.sampling.open

    async def give_up(self, future: Future) -> None:
        self.sampling.give_up(future)

    def start(self) -> None:
        """Its engine is ready already."""

    async def drain(self, deadline: float) -> None:
        """Nothing is under way."""

    async def _stop(self, deadline: float) -> None:
        self.stopped = True


class Place:
    """Two replicas; the first has 40 samples, the second none."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.opened: list[Future] = []
        self.forgotten: list[Dispatcher] = []

        def make(engine: EngineSettings, blame: Blame, hand_over: HandOver | None) -> Dispatcher:
            return cast(Dispatcher, Queue(engine.name, store, settings))

        entry = EngineSettings(name="e", base_model="m", roles=("sample",), replicas=2)
        self.replicas = Replicas(entry, settings, store, make, self.forgotten.append, self.opened.append)
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


def wanting(place: Place, number: int) -> None:
    place.replicas.wanted = number
    place.replicas._match()


async def test_one_that_is_ready_stays_until_another_one_is(place: Place) -> None:
    place.one.ready = False
    wanting(place, 1)
    assert list(place.replicas.active) == [1, 2]
    place.one.ready = True
    wanting(place, 1)
    assert list(place.replicas.active) == [1]
    await asyncio.gather(*place.replicas._ending.values())


async def test_of_those_that_are_too_many_as_many_stay_as_are_missing(place: Place) -> None:
    wanting(place, 4)
    ready = cast(list[Queue], list(place.replicas.active.values()))
    assert len(ready) == 4
    ready[0].ready = ready[3].ready = False
    wanting(place, 1)  # one is missing: of 2 and 3, which are ready, one stays
    assert list(place.replicas.active) == [1, 2]
    await asyncio.gather(*place.replicas._ending.values())


@pytest.mark.parametrize("step", ["take", "drain", "stop"])
async def test_an_error_while_one_is_ended_frees_its_number_when_it_has_stopped(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    async def fails(_: float) -> None:
        if step == "stop":
            assert place.forgotten == []
            monkeypatch.setattr(place.other.supervisor, "stop", place.other._stop)
        raise RuntimeError("a bug")

    monkeypatch.setattr("gateway.replicas._STOP_AGAIN_S", 0.01)
    place.one, place.other = place.other, place.one  # the one that ends has samples
    place.replicas.active = {1: cast(Dispatcher, place.one), 2: cast(Dispatcher, place.other)}
    if step == "take":
        monkeypatch.setattr(place.other.sampling, "take", lambda count: 1 / 0)
    else:
        monkeypatch.setattr(place.other if step == "drain" else place.other.supervisor, step, fails)
    wanting(place, 1)
    [ending] = place.replicas._ending.values()
    await ending
    assert not place.replicas._ending
    assert place.forgotten == [cast(Dispatcher, place.other)]
    assert place.other.stopped
    assert "unexpected error while ending it" in caplog.text
    wanting(place, 2)
    assert list(place.replicas.active) == [1, 2]


async def test_one_that_cannot_be_stopped_keeps_its_number(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(_: float) -> None:
        raise RuntimeError("it does not end")

    monkeypatch.setattr("gateway.replicas._STOP_AGAIN_S", 0.01)
    monkeypatch.setattr(place.other.supervisor, "stop", fails)
    wanting(place, 1)
    await asyncio.gather(*place.replicas._ending.values())
    assert place.forgotten == []  # so that it is stopped at the gateway's end
    assert caplog.text.count("unexpected error while ending it") == 5
    assert "no other one gets its place" in caplog.text
    wanting(place, 2)  # its devices are not free
    assert list(place.replicas.active) == [1]


async def test_one_that_cannot_be_stopped_does_not_keep_the_gateway_from_ending(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def fails(_: float) -> None:
        raise RuntimeError("it does not end")

    monkeypatch.setattr(place.one.supervisor, "stop", fails)
    fleet = Fleet(Settings(data_dir=tmp_path), place.store, print, print, print)
    fleet.dispatchers = {queue.name: cast(Dispatcher, queue) for queue in (place.one, place.other)}
    await asyncio.wait_for(fleet.drain(), 30)
    assert place.other.stopped
    assert "it does not end" in caplog.text


async def test_one_whose_end_the_gateways_own_cuts_short_stays_known(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(_: float) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(place.other, "drain", hangs)
    wanting(place, 1)
    await asyncio.sleep(0)
    await place.replicas.stop_tending()
    assert place.forgotten == []
    assert not place.other.stopped
