"""A call under a used number is the first one sent again, or refused: while that is open, settled lately, or stored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.errors import NumberTaken
from gateway.futures import Futures
from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.records import Future, FutureStatus, Outcome
from gateway.turns import digest_of
from tests.store.conftest import a_run, a_session, an_operation

SENT = digest_of("forward_backward", b"one")
OTHER = digest_of("forward_backward", b"two")


def futures_of(store: Store, cache_bytes: int = 10**6) -> tuple[Futures, list[Future]]:
    """The calls of one gateway process, and those of them that were handed on."""
    accepted: list[Future] = []
    return Futures(store, lambda future, _: accepted.append(future), cache_bytes), accepted


async def an_accepted(store: Store, futures: Futures, digest: bytes | None = SENT) -> Future:
    run = a_run(await store.sessions.create(a_session()))
    create = an_operation(run, 0, "create_run")
    await futures.submit(Submission(create, b"x", run))
    assert await store.futures.settle(Outcome(create, b""), futures.settled) is not None
    future = an_operation(run, 1, digest=digest)
    await futures.submit(Submission(future, b"x"))
    return future


async def settle(store: Store, futures: Futures, future: Future) -> None:
    await store.futures.claim(Claim((future.request_id,), 1))
    assert await store.futures.settle(Outcome(replace(future, epoch=1), b"r"), futures.settled) is not None


@pytest.mark.parametrize("known", ["open", "recent", "stored open", "stored settled"])
async def test_another_call_under_a_used_number_is_refused(store: Store, known: str) -> None:
    futures, accepted = futures_of(store)
    first = await an_accepted(store, futures)
    if known in ("recent", "stored settled"):
        await settle(store, futures, first)
    if known.startswith("stored"):  # another process, which has not seen any of it
        futures, accepted = futures_of(store)
    before = await store.futures.get(first.request_id)
    others = [replace(first, digest=OTHER), replace(first, kind="optim_step", digest=OTHER)]
    others.append(replace(others[1], status=FutureStatus.FAILED, error="bad", error_category="user"))
    for other in others:
        with pytest.raises(NumberTaken, match=f"seq_id .* forward_backward, .* {other.kind} ") as refusal:
            await futures.submit(Submission(other, b"y"))
        assert refusal.value.param == "seq_id"
        assert f"number 1 of {first.run_id}" in refusal.value.message
    for again in (first, replace(first, digest=None)):
        await futures.submit(Submission(again, b"x"))
    assert await store.futures.get(first.request_id) == before
    handed_on = [future.digest for future in accepted if future.request_id == first.request_id]
    assert handed_on == ([] if known == "stored settled" else [SENT])


async def test_a_call_from_before_there_were_digests_is_like_any(store: Store) -> None:
    futures, _ = futures_of(store)
    first = await an_accepted(store, futures, digest=None)
    for process in (futures, futures_of(store)[0]):
        await process.submit(Submission(replace(first, digest=OTHER), b"y"))
    assert await store.futures.inputs([first.request_id]) == {first.request_id: b"x"}


async def test_what_a_number_is_of_is_named(store: Store) -> None:
    """The field that the client has to change: a run's number, or the key of one that does not number."""
    futures, _ = futures_of(store)
    run = a_run(await store.sessions.create(a_session()))
    create = an_operation(run, 0, "create_run", digest=SENT)
    keyed = an_operation(run, 1, request_id=f"{run.run_id}:key-0", digest=SENT)
    sample = an_operation(run, 7, "sample", run_id=None, sampler_id="x", request_id="x:7", digest=SENT)
    await futures.submit(Submission(create, b"x", run))
    for future in (keyed, sample):
        await futures.submit(Submission(future, b"x"))
    for future, field in ((create, "model_seq_id"), (keyed, "X-Idempotency-Key"), (sample, "seq_id")):
        with pytest.raises(NumberTaken, match=f"^{field} ") as refusal:
            await futures.submit(Submission(replace(future, digest=OTHER), b"y"))
        assert refusal.value.param == field
