"""The lane of the samples over a real store and an engine whose samples end when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gateway.dispatch.blame import Blame
from gateway.dispatch.quarantine import Quarantine
from gateway.dispatch.sampling import GIVEN_UP, SamplingLane
from gateway.engine_process import Drawn, EngineProcess
from gateway.migrate import upgrade
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Claim, Submission
from gateway.store.leases import LeaseRequest
from gateway.store.records import Future, FutureStatus


class PatientEngine:
    """Holds every sample until `finish` names it."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(epoch=1, name="e", base_model="m")
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.inside: dict[str, asyncio.Event] = {}
        self.parties: dict[str, str] = {}
        self._changed = asyncio.Event()

    async def sample(self, body: bytes, party: str) -> AsyncGenerator[Drawn, None]:
        name = body.decode()
        ended = self.inside[name] = asyncio.Event()
        self.parties[name] = party
        self._changed.set()
        try:
            await ended.wait()
        finally:
            del self.inside[name]
            self._changed.set()
        yield Drawn(b"result", prompt_tokens=1, cached_tokens=0, sampled_tokens=1)

    async def comes_to_hold(self, *names: str) -> None:
        """Wait until exactly these samples are in the engine."""
        async with asyncio.timeout(5):
            while set(self.inside) != set(names):
                self._changed.clear()
                await self._changed.wait()

    def finish(self, name: str) -> None:
        self.inside[name].set()


class Place:
    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.engine = PatientEngine()
        self.lane = SamplingLane(store, settings, lambda settled: None, Blame(2))

    async def submit(self, owner: str, name: str, deaths: int = 0) -> None:
        future = Future(
            request_id=f"{owner}:{name}",
            owner=owner,
            engine="e",
            kind="sample",
            seq_id=0,
            created_at=time.time(),
            sampler_id=f"{owner}:{name}",
            deaths=deaths,
        )
        body = name.encode()
        await self.store.futures.submit(Submission(future, body), lambda _: self.lane.accept(future, body))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
    await upgrade(database)
    store = Store(database)
    store.start()
    place = Place(store, Settings(data_dir=tmp_path, samples_in_engine=2))
    feeding = asyncio.create_task(place.lane.feed(cast(EngineProcess, place.engine), Quarantine()))
    yield place
    feeding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await feeding
    await place.lane.cancel()
    await store.close()


async def test_an_owner_with_nothing_in_the_engine_does_not_wait_for_another(place: Place) -> None:
    for name in ("a1", "a2", "a3"):
        await place.submit("alice", name)
    await place.engine.comes_to_hold("a1", "a2")
    await place.submit("bob", "b1")
    await place.submit("bob", "b2")
    await place.engine.comes_to_hold("a1", "a2", "b1")
    assert place.engine.parties == {"a1": "alice", "a2": "alice", "b1": "bob"}
    place.engine.finish("b1")
    await place.engine.comes_to_hold("a1", "a2", "b2")
    place.engine.finish("a1")  # two are inside, which is all that there is room for
    await place.engine.comes_to_hold("a2", "b2")
    place.engine.finish("b2")
    await place.engine.comes_to_hold("a2", "a3")


async def test_a_suspect_runs_alone_and_soon(place: Place) -> None:
    await place.submit("alice", "a1")
    await place.engine.comes_to_hold("a1")
    await place.submit("bob", "suspect", deaths=2)
    await place.submit("alice", "a2")
    await asyncio.sleep(0.05)
    assert set(place.engine.inside) == {"a1"}
    place.engine.finish("a1")
    await place.engine.comes_to_hold("suspect")
    await asyncio.sleep(0.05)
    assert set(place.engine.inside) == {"suspect"}
    place.engine.finish("suspect")
    await place.engine.comes_to_hold("a2")


async def test_a_sample_that_an_earlier_engine_had_is_given_up_in_the_name_of_this_one(place: Place) -> None:
    for epoch in (1, 2):
        assert await place.store.leases.take(LeaseRequest("e", "us", 600)) == epoch
    lane = place.lane
    lane.epoch = 2
    for name in ("a1", "a2", "a3"):
        await place.submit("alice", name)  # the engine has room for two
    await place.engine.comes_to_hold("a1", "a2")
    lane._waiting["alice:a3"] = waiting = replace(lane._waiting["alice:a3"], epoch=1)
    lane.give_up(waiting)
    await place.store.database.barrier()
    stored = await place.store.futures.get("alice:a3")
    assert stored is not None
    assert (stored.status, stored.error) == (FutureStatus.FAILED, GIVEN_UP)


async def test_what_another_gateway_has_settled_is_neither_waited_for_nor_drawn(place: Place) -> None:
    for name in ("a1", "a2", "a3"):
        await place.submit("alice", name)
    await place.engine.comes_to_hold("a1", "a2")
    place.lane.withdraw(["alice:a1", "alice:a3", "bob:unknown"])
    await place.engine.comes_to_hold("a2")
    await asyncio.sleep(0.05)  # a3 would be taken now
    assert set(place.engine.inside) == {"a2"}
    assert place.lane.in_engine == {"alice:a2"}  # only that could be blamed for the engine's death


async def test_what_another_gateway_settles_while_it_is_being_claimed_is_not_drawn(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """News come on a connection of their own, and may be here before the answer to the claim."""
    claim = place.store.futures.claim

    async def overtaken(claimed: Claim) -> dict[str, bytes]:
        inputs = await claim(claimed)
        place.lane.withdraw(["alice:a1"])
        return inputs

    monkeypatch.setattr(place.lane._inputs, "take", lambda _: None)  # they came to the other gateway
    monkeypatch.setattr(place.store.futures, "claim", overtaken)
    for name in ("a1", "a2"):
        await place.submit("alice", name)
    await place.engine.comes_to_hold("a2")
    await asyncio.sleep(0.05)
    assert set(place.engine.inside) == {"a2"}
    await place.submit("alice", "a3")
    await place.engine.comes_to_hold("a2", "a3")
