"""Bounded queues: of a run, of an owner at an engine, of an owner's samples, in calls and in bytes; and what a waiting
call is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from gateway.dispatch.blame import Blame
from gateway.dispatch.room import Load, bytes_load, require_room
from gateway.dispatch.sampling import SamplingLane
from gateway.dispatch.training import TrainingLane
from gateway.errors import TooManyRequests
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.records import Future, FutureStatus, Settled
from tests.dispatch.test_run_queue import operation

SETTINGS = Settings(max_queued_per_run=3, max_queued_per_owner=5, max_queued_samples=2, samples_in_engine=7)


def training(*accepted: Future) -> TrainingLane:
    """A lane that has these operations and feeds no engine."""
    lane = TrainingLane(cast(Store, None), SETTINGS, lambda settled: None, Blame(2))
    for future in accepted:
        if future.run_id not in lane._queue.runs:
            lane.accept(operation(future.run_id or "", 0, "create_run", future.owner))
        lane.accept(future)
    return lane


def sample(number: int, owner: str = "alice") -> Future:
    values: dict[str, Any] = {
        "owner": owner,
        "engine": "e",
        "kind": "sample",
        "seq_id": number,
        "created_at": 0.0,
    }
    return Future(request_id=f"x:{number}", sampler_id="x", **values)


def test_a_run_has_a_bound() -> None:
    lane = training(operation("a", 1), operation("a", 2))  # and its creation
    with pytest.raises(TooManyRequests, match=r"3 operations of run a .*max_queued_per_run"):
        lane.require_room(operation("a", 3))
    lane.require_room(operation("b", 0, "create_run"))


def test_an_owner_has_a_bound_whatever_the_run() -> None:
    lane = training(operation("a", 1), operation("b", 1), operation("c", 1, owner="bob"))
    lane.require_room(operation("b", 2))
    lane.accept(operation("b", 2))
    with pytest.raises(TooManyRequests, match=r"5 operations of yours .*max_queued_per_owner"):
        lane.require_room(operation("d", 0, "create_run"))
    lane.require_room(operation("c", 2, owner="bob"))


def test_what_has_been_settled_makes_room() -> None:
    lane = training(operation("a", 1), operation("a", 2))
    [created] = lane._queue.take_batch(lambda _: 1.0)
    lane._queue.settled(created)
    lane.require_room(operation("a", 3))
    assert lane._queue.load["alice"] == 2


def test_a_gap_that_is_given_up_makes_room() -> None:
    lane = training(operation("a", 2), operation("a", 3))
    [created] = lane._queue.take_batch(lambda _: 1.0)
    lane._queue.settled(created)
    assert lane._queue.load["alice"] == 2
    lane._queue.runs["a"].abandon_gap()
    assert lane._queue.load["alice"] == 0


def test_what_others_wait_for_is_taken_though_the_queue_is_full() -> None:
    """The first of a call's chunks is sent last; refused, it would keep those that are here waiting for ever."""
    lane = training(operation("a", 2), operation("a", 3))
    lane.require_room(operation("a", 1))
    with pytest.raises(TooManyRequests):
        lane.require_room(operation("a", 4))


def test_what_others_wait_for_is_taken_up_to_twice_the_bound() -> None:
    """Else a sender could name a high number first, and fill everything with what comes before it."""
    lane = training(operation("a", 9), operation("a", 8))
    for number in (7, 6, 5):
        lane.require_room(operation("a", number))
        lane.accept(operation("a", number))
    with pytest.raises(TooManyRequests, match="6 operations of run a"):
        lane.require_room(operation("a", 4))


def test_bytes_of_operations_count_until_their_outcome_is_stored() -> None:
    lane = training()
    first, second = (replace(operation("a", number), input_bytes=100 * number) for number in (1, 2))
    lane.accept(operation("a", 0, "create_run"))
    for future in (first, second, second):  # a notice may come twice
        lane.accept(future)
    assert (lane.queued.of("alice"), lane.queued.of("bob")) == (300, 0)
    lane._settled(Settled(first, b""))
    assert lane.queued.of("alice") == 200
    lane._settled(Settled(first, b""))
    assert lane.queued.of("alice") == 200
    lane.reset()
    assert lane.queued.of("alice") == 0
    lane.reopen(second)  # found in the database; its run's log is read later
    assert lane.queued.of("alice") == 200


def test_rejected_operations_have_no_bytes() -> None:
    lane = training(replace(operation("a", 2), status=FutureStatus.FAILED, input_bytes=100))
    assert lane.queued.of("alice") == 0


def test_bytes_of_samples_count_until_they_are_over() -> None:
    lane = SamplingLane(cast(Store, None), SETTINGS, lambda settled: None, Blame(2))
    for number in (1, 2, 4):
        lane.accept(replace(sample(number), input_bytes=number))
    assert lane.queued.of("alice") == 7
    lane.withdraw(["x:2", "x:unknown"])
    assert lane.queued.of("alice") == 5


def a_bytes_load(waiting: int) -> Load:
    return bytes_load(waiting, Settings(max_queued_bytes=1000))


def test_bytes_have_a_bound() -> None:
    require_room([a_bytes_load(999)], lambda: False)
    with pytest.raises(TooManyRequests, match=r"1000 bytes of calls of yours .*max_queued_bytes"):
        require_room([a_bytes_load(1000)], lambda: False)
    require_room([a_bytes_load(1999)], lambda: True)
    with pytest.raises(TooManyRequests):
        require_room([a_bytes_load(2000)], lambda: True)


def test_operations_of_runs_that_are_not_open_count_too() -> None:
    """As all do while their engine starts."""
    lane = TrainingLane(cast(Store, None), SETTINGS, lambda settled: None, Blame(2))
    for run_id in ("a", "b"):
        for seq_id in (4, 5):
            lane.accept(operation(run_id, seq_id))
    lane.require_room(operation("b", 6))
    lane.accept(operation("b", 6))
    with pytest.raises(TooManyRequests, match="3 operations of run b"):
        lane.require_room(operation("b", 7))
    with pytest.raises(TooManyRequests, match="5 operations of yours"):
        lane.require_room(operation("c", 1))
    lane.require_room(operation("b", 3))


def test_samples_of_an_owner_have_a_bound() -> None:
    lane = SamplingLane(cast(Store, None), SETTINGS, lambda settled: None, Blame(2))
    lane.accept(sample(1))
    lane.require_room("alice")
    lane.accept(sample(2))
    with pytest.raises(TooManyRequests, match=r"2 samples of yours .*max_queued_samples"):
        lane.require_room("alice")
    lane.require_room("bob")


def test_a_waiting_sample_is_told_its_place() -> None:
    lane = SamplingLane(cast(Store, None), SETTINGS, lambda settled: None, Blame(2))
    for number, owner in ((1, "alice"), (2, "bob"), (3, "alice"), (4, "alice")):
        lane.accept(sample(number, owner))
    standing = lane.standing(sample(4))
    assert standing.paused
    assert standing.reason.startswith("2 samples of yours come before it")
    assert "at most 7" in standing.reason
    assert lane.standing(sample(2, "bob")).reason.startswith("0 samples")


def test_a_waiting_operation_is_told_its_place() -> None:
    lane = training(operation("a", 1), operation("a", 2), operation("a", 4))
    assert lane.standing(operation("a", 2)).reason == "2 operations of its run come before it"
    [created] = lane._queue.take_batch(lambda _: 1.0)
    assert lane.standing(created).reason == "it is being performed"
    for done in (0, 1, 2):
        assert lane._queue.runs["a"].next_seq == done
        lane._queue.settled(operation("a", done))
    assert lane.standing(operation("a", 4)).reason == "operation 3 of its run has not arrived"
    assert not lane.standing(operation("a", 4)).paused
