"""What gateways of one database know of each other: leases with their holders, facts, signs of life, notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from engines.interface import EngineInfo
from gateway.errors import StoreUnavailable
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.engine_facts import EngineFacts
from gateway.store.futures import Claim, Queued, Submission
from gateway.store.gateways import SignOfLife
from gateway.store.leases import LeaseRequest
from gateway.store.listening import Listener
from gateway.store.notices import News, Notice, decoded, payload_of
from gateway.store.outages import StoreConflict
from gateway.store.records import Future, FutureStatus, Outcome
from tests.store.conftest import a_run, a_session, an_operation

INFO = EngineInfo(
    base_model="m",
    architecture="a",
    roles=("train", "sample"),
    vocab_size=9,
    max_context=99,
    losses=("cross_entropy",),
    max_rank=8,
    eos_tokens=(1,),
    max_top_logprobs=3,
    device="cpu",
    dtype="float32",
    deterministic=True,
    versions={"numpy": "2"},
    layers={"q": (3, 4)},
)


async def test_a_lease_tells_who_has_it_where_and_how_it_goes_there(store: Store) -> None:
    assert await store.leases.get("e") is None
    mine = LeaseRequest("e", "me", 60, "starting")
    assert await store.leases.take(mine) == 1
    await store.gateways.report(SignOfLife("me", "http://me:1", 60))
    assert await store.leases.renew(replace(mine, state="failed", problem="no such folder"))
    lease = await store.leases.get("e")
    assert lease is not None
    assert 55 < lease.seconds_left <= 60
    assert (lease.holder, lease.epoch, lease.url) == ("me", 1, "http://me:1")
    assert (lease.state, lease.problem) == ("failed", "no such folder")


async def test_a_lease_that_is_given_back_is_free_at_once_and_only_its_holder_gives_it(store: Store) -> None:
    mine, yours = LeaseRequest("e", "me", 60), LeaseRequest("e", "you", 60)
    assert await store.leases.take(mine) == 1
    await store.leases.give_back(yours)
    assert await store.leases.take(yours) is None
    await store.leases.give_back(mine)
    assert await store.leases.take(yours) == 2


@pytest.mark.postgres
async def test_leases_go_by_the_databases_clock(pg_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway whose clock is an hour ahead takes nobody's lease."""
    store = Store(Database(pg_url))
    store.start()
    try:
        assert await store.leases.take(LeaseRequest("e", "me", 60)) == 1
        ahead = time.time() + 3600
        monkeypatch.setattr("time.time", lambda: ahead)
        assert await store.leases.take(LeaseRequest("e", "you", 60)) is None
        lease = await store.leases.get("e")
        assert lease is not None
        assert 50 < lease.seconds_left <= 60
    finally:
        await store.close()


async def test_facts_of_a_later_start_replace_those_of_an_earlier_one(store: Store) -> None:
    assert await store.engine_facts.newer_than("e", 0) is None
    first = EngineFacts("e", 3, INFO, {"tokenizer.json": b"\0\xff" * 1000})
    await store.engine_facts.tell(first)
    assert await store.engine_facts.newer_than("e", 0) == first
    assert await store.engine_facts.newer_than("e", 3) is None
    await store.engine_facts.tell(replace(first, epoch=2, tokenizer_files={}))  # somebody late
    assert await store.engine_facts.newer_than("e", 0) == first
    await store.engine_facts.tell(replace(first, epoch=4, tokenizer_files={"a": b"b"}))
    found = await store.engine_facts.newer_than("e", 3)
    assert found is not None
    assert found.tokenizer_files == {"a": b"b"}


async def test_gateways_know_each_other_as_long_as_they_give_signs_of_life(store: Store) -> None:
    def sign(holder: str, seconds: float = 60) -> SignOfLife:
        return SignOfLife(holder, "", seconds)

    assert await store.gateways.report(sign("a")) == frozenset()
    assert await store.gateways.report(sign("b")) == {"a"}
    assert await store.gateways.report(sign("a")) == {"b"}
    await asyncio.sleep(0.05)
    assert await store.gateways.report(sign("c", seconds=0.01)) == frozenset()
    await store.gateways.leave("b")
    assert await store.gateways.report(sign("a")) == {"c"}


async def test_what_waits_is_counted_by_run_and_owner(store: Store) -> None:
    run = a_run(await store.sessions.create(a_session()))
    sample = an_operation(run, 5, "sample", run_id=None, sampler_id="x", request_id="x:5")
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"", run))
    for future in (an_operation(run, 3, input_bytes=40), replace(sample, input_bytes=7)):
        await store.futures.submit(Submission(future, bytes(future.input_bytes)))
    assert set(await store.futures.queues("e")) == {
        Queued("alice", run.run_id, 2, 3, 40),
        Queued("alice", None, 1, 5, 7),
    }
    assert await store.futures.queues("another") == []


async def test_what_others_have_accepted_lately_and_settled_is_found(store: Store) -> None:
    run = a_run(await store.sessions.create(a_session()))
    create, first = an_operation(run, 0, "create_run"), an_operation(run, 1)
    old = an_operation(run, 2, created_at=time.time() - 1000)
    await store.futures.submit(Submission(create, b"", run))
    for future in (first, old):
        await store.futures.submit(Submission(future, b""))
    await settle(store, create, b"made")
    lately = time.time() - 100
    assert await store.futures.open_ids("e", lately) == [first.request_id]
    asked = [create.request_id, first.request_id, "nobody's"]
    [settled] = await store.futures.settled_of(asked)
    assert (settled.future.status, settled.result) == (FutureStatus.DONE, b"made")
    assert {future.request_id for future in await store.futures.many(asked)} == set(asked[:2])


async def settle(store: Store, future: Future, result: bytes) -> bool:
    await store.futures.claim(Claim((future.request_id,), 1))
    return await store.futures.settle(Outcome(replace(future, epoch=1), result)) is not None


async def test_who_has_lost_a_lease_settles_and_claims_nothing(store: Store) -> None:
    """Also what nobody has claimed since: its numbers would follow from outcomes that were refused."""
    run = a_run(await store.sessions.create(a_session()))
    create, first, second = an_operation(run, 0, "create_run"), an_operation(run, 1), an_operation(run, 2)
    await store.futures.submit(Submission(create, b"", run))
    for future in (first, second):
        await store.futures.submit(Submission(future, b""))
    assert await store.leases.take(LeaseRequest("e", "old", -1)) == 1
    assert await settle(store, create, b"made")
    await store.futures.claim(Claim((first.request_id,), 1))
    assert await store.leases.take(LeaseRequest("e", "new", 60)) == 2
    assert not await settle(store, first, b"late")
    assert await store.futures.settle(Outcome(second, error="gap", error_category="user", fence=1)) is None
    assert await store.futures.claim(Claim((second.request_id,), 1)) == {}
    claimed = await store.futures.claim(Claim((first.request_id,), 2))
    assert claimed == {first.request_id: b""}
    outcome = Outcome(replace(first, epoch=2), b"right")
    assert await store.futures.settle(outcome) is not None
    assert (
        await store.futures.settle(Outcome(second, error="gap", error_category="user", fence=2)) is not None
    )


async def test_what_an_earlier_epoch_had_in_hand_waits_again(store: Store) -> None:
    """The schema lets one operation of a run run: one that an old holder has marked must not keep the next one out."""
    run = a_run(await store.sessions.create(a_session()))
    await store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"", run))
    first, second = an_operation(run, 1), an_operation(run, 2)
    for future in (first, second):
        await store.futures.submit(Submission(future, b""))
    await store.futures.claim(Claim((second.request_id,), 1))
    await store.futures.requeue("another", 9)
    await store.futures.requeue("e", 1)
    with pytest.raises(IntegrityError):
        await store.futures.claim(Claim((first.request_id,), 2))
    await store.futures.requeue("e", 2)
    assert await store.futures.claim(Claim((first.request_id,), 2)) == {first.request_id: b""}


@pytest.mark.postgres
async def test_the_locks_of_a_process_that_stands_still_are_released(
    pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient: dict[str, Any] = {"server_settings": {"idle_in_transaction_session_timeout": "300"}}
    monkeypatch.setattr("gateway.store.drivers._POSTGRES", impatient)
    still, other = Store(Database(pg_url)), Store(Database(pg_url))
    for store in (still, other):
        store.start()
    await still.leases.take(LeaseRequest("e", "still", -1))

    def stands_still(connection: Connection, _: list[None]) -> list[None]:
        connection.execute(text("update leases set epoch = epoch + 10"))
        time.sleep(1)
        connection.execute(text("select 1"))
        return [None]

    try:
        with pytest.raises(StoreUnavailable):
            await still.database.write(stands_still, None)
        assert await other.leases.take(LeaseRequest("e", "other", 60)) == 2
        assert (
            await still.leases.take(LeaseRequest("e", "still", 60)) is None
        )  # on a connection of its own again
    finally:
        for store in (still, other):
            await store.close()


async def test_a_sample_is_given_up_in_the_database_whoever_has_it_in_hand(store: Store) -> None:
    run = a_run(await store.sessions.create(a_session()))
    operation = an_operation(run, 0, "create_run")
    sample = an_operation(run, 5, "sample", run_id=None, sampler_id="x", request_id="x:5")
    await store.futures.submit(Submission(operation, b"", run))
    await store.futures.submit(Submission(sample, b"prompt"))
    await store.futures.claim(Claim((sample.request_id,), 1))
    for future in (sample, operation):
        await store.futures.give_up(future.request_id, "not wanted")
    ids = [sample.request_id, operation.request_id]
    assert set(await store.futures.inputs(ids)) == {operation.request_id}
    found = {future.kind: future for future in await store.futures.many(["x:5", operation.request_id])}
    assert (found["sample"].status, found["sample"].error) == (FutureStatus.FAILED, "not wanted")
    assert found["sample"].error_category == "user"
    assert found["create_run"].open  # operations are never given up
    assert not await settle(store, sample, b"late")
    await store.futures.give_up("x:5", "again")
    [settled] = await store.futures.settled_of(["x:5"])
    assert settled.future.error == "not wanted"


# ---------------------------------------------------------------------------- notices


def test_payloads_are_bounded_and_say_when_they_leave_something_out() -> None:
    few = [Notice("accepted", "r:1", "e"), Notice("settled", "r:0"), Notice("dropped", "r", "e")]
    assert decoded(payload_of("me", few)) == News("me", {"e": ["r:1"]}, ["r:0"], {"e": ["r"]})
    many = [
        *few,
        *(Notice("settled", f"{'é' * 40}:{number}") for number in range(200)),
        Notice("free", "", "e"),
    ]
    payload = payload_of("me", many)
    assert len(payload.encode()) < 8000
    assert decoded(payload) == News("me", free=["e"], look=True)
    assert decoded("{") == News("", look=True)
    assert decoded('{"sender":"x","later":1}') == News("x")


@pytest.fixture
async def heard(pg_url: str) -> AsyncIterator[tuple[Store, list[News], Listener]]:
    """A store whose notices are heard, and the news."""
    news: list[News] = []
    connected = asyncio.Event()
    store = Store(Database(pg_url))
    store.start()
    listener = Listener(pg_url, news.append, connected.set)
    task = asyncio.create_task(listener.listen_forever())
    await asyncio.wait_for(connected.wait(), 10)
    yield store, news, listener
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it does not come to pass")


@pytest.mark.postgres
async def test_a_commit_tells_others_when_there_are_any(
    heard: tuple[Store, list[News], Listener],
) -> None:
    store, news, _ = heard
    run = a_run(await store.sessions.create(a_session()))
    create = an_operation(run, 0, "create_run")
    notice = Notice("accepted", create.request_id, "e")
    await store.futures.submit(Submission(create, b"", run), notice=notice)
    store.database.payload_of = lambda notices: payload_of("me", notices)
    await settle(store, create, b"made")
    await until(lambda: bool(news))
    assert news == [News("me", settled=[create.request_id])]  # nothing of what came before anybody was known
    news.clear()
    futures = [an_operation(run, number) for number in range(1, 9)]
    await asyncio.gather(
        *(
            store.futures.submit(Submission(each, b""), notice=Notice("accepted", each.request_id, "e"))
            for each in futures
        )
    )
    ids = sorted(each.request_id for each in futures)
    await until(lambda: sorted(key for each in news for key in each.accepted.get("e", [])) == ids)
    assert len(news) <= 2  # one for each transaction


@pytest.mark.postgres
async def test_a_refused_transaction_tells_nothing(heard: tuple[Store, list[News], Listener]) -> None:
    store, news, _ = heard
    store.database.payload_of = lambda notices: payload_of("me", notices)

    def refused(connection: Connection, _: list[None]) -> list[None]:
        connection.execute(text("select 1/0"))
        return [None]

    with pytest.raises(Exception, match="division by zero"):
        await store.database.write(refused, None, notice=Notice("settled", "x"))
    await store.database.tell(Notice("settled", "y"))
    await until(lambda: bool(news))
    assert news == [News("me", settled=["y"])]


@pytest.mark.postgres
async def test_a_listener_whose_connection_is_cut_listens_again(
    heard: tuple[Store, list[News], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, news, listener = heard
    again = asyncio.Event()
    monkeypatch.setattr(listener, "_connected", again.set)
    cut = text("select pg_terminate_backend(pid) from pg_stat_activity where query ilike 'listen%'")
    assert len(await store.database.rows(cut)) == 1
    await asyncio.wait_for(again.wait(), 10)
    await store.database.tell_all(News("you", joined=True))
    await until(lambda: bool(news))
    assert news == [News("you", joined=True)]


@pytest.mark.postgres
async def test_transactions_in_each_others_way_are_repeated(pg_url: str) -> None:
    """Two gateways lock two rows in opposite order, which Postgres ends as a deadlock; both come to their end."""
    stores = [Store(Database(pg_url)) for _ in range(2)]
    for store in stores:
        store.start()
        await store.leases.take(LeaseRequest("a", "me", 60))
        await store.leases.take(LeaseRequest("b", "me", 60))
    tries = 0

    def locking(first: str, second: str) -> Callable[[Connection, list[None]], list[None]]:
        def operation(connection: Connection, arguments: list[None]) -> list[None]:
            nonlocal tries
            tries += 1
            for engine in (first, second):
                lock = text("update leases set epoch = epoch + 1 where engine = :engine")
                connection.execute(lock, {"engine": engine})
                connection.execute(text("select pg_sleep(0.3)"))
            return [None] * len(arguments)

        return operation

    before = [lease.epoch for lease in [await stores[0].leases.get(name) for name in "ab"] if lease]
    try:
        await asyncio.gather(
            stores[0].database.write(locking("a", "b"), None),
            stores[1].database.write(locking("b", "a"), None),
        )
        after = [lease.epoch for lease in [await stores[0].leases.get(name) for name in "ab"] if lease]
        assert after == [epoch + 2 for epoch in before]
        assert tries > 2  # one of them was ended, and repeated
    finally:
        for store in stores:
            await store.close()


@pytest.mark.postgres
async def test_a_transaction_that_is_always_in_the_way_is_refused_for_now(pg_url: str) -> None:
    store = Store(Database(pg_url))
    store.start()

    def unlucky(connection: Connection, _: list[None]) -> list[None]:
        connection.execute(text("do $$ begin raise sqlstate '40001'; end $$"))
        return [None]

    try:
        with pytest.raises(StoreConflict) as refusal:
            await store.database.write(unlucky, None)
        assert isinstance(refusal.value, StoreUnavailable)
        assert refusal.value.status == 503
    finally:
        await store.close()
