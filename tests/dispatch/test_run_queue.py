"""What is next: logs in order, owners in turn, nothing twice."""

from __future__ import annotations

import time
from dataclasses import replace

from gateway.dispatch.run_queue import TrainingQueue, Turns
from gateway.store.records import Future, FutureStatus


def operation(run_id: str, seq_id: int, kind: str = "optim_step", owner: str = "alice") -> Future:
    return Future(
        request_id=f"{run_id}:{seq_id}",
        owner=owner,
        engine="e",
        kind=kind,
        seq_id=seq_id,
        created_at=time.time(),
        run_id=run_id,
    )


def opened(*futures: Future, next_seq: int = 1) -> TrainingQueue:
    """A queue with these operations; each run begins at `next_seq`."""
    queue = TrainingQueue()
    for future in futures:
        if future.run_id not in queue.runs:
            queue.open_run(future.run_id or "", future.owner, next_seq, [])
        queue.add(future)
    return queue


def ids(batch: list[Future]) -> list[str]:
    return [future.request_id for future in batch]


def test_a_log_is_taken_in_order_one_at_a_time() -> None:
    queue = opened(operation("a", 2), operation("a", 1))
    first = queue.take_batch()
    assert ids(first) == ["a:1"]
    assert queue.take_batch() == []
    queue.settled(first[0])
    assert ids(queue.take_batch()) == ["a:2"]


def test_a_gap_holds_back_what_is_behind_it() -> None:
    queue = opened(operation("a", 2))
    assert queue.take_batch() == []
    queue.add(operation("a", 1))
    assert ids(queue.take_batch()) == ["a:1"]


def test_a_rejected_number_is_passed_over() -> None:
    rejected = replace(operation("a", 1), status=FutureStatus.FAILED)
    queue = opened(operation("a", 2), rejected)
    assert ids(queue.take_batch()) == ["a:2"]


def test_an_operation_is_queued_once() -> None:
    queue = opened(operation("a", 1), operation("a", 1))
    [first] = queue.take_batch()
    queue.add(operation("a", 1))
    queue.settled(first)
    queue.add(operation("a", 1))
    assert queue.take_batch() == []


def test_short_operations_of_different_runs_go_together() -> None:
    queue = opened(operation("a", 1), operation("b", 1), operation("c", 1, "forward_backward"))
    assert ids(queue.take_batch()) == ["a:1", "b:1"]
    assert ids(queue.take_batch()) == ["c:1"]


def test_passes_go_alone() -> None:
    queue = opened(operation("a", 1, "forward_backward"), operation("b", 1, "forward_backward"))
    assert ids(queue.take_batch()) == ["a:1"]
    assert ids(queue.take_batch()) == ["b:1"]


def test_what_an_engine_died_over_goes_alone() -> None:
    queue = opened(replace(operation("a", 1), deaths=1), operation("b", 1), operation("c", 1))
    assert ids(queue.take_batch()) == ["a:1"]
    assert ids(queue.take_batch()) == ["b:1", "c:1"]


def test_an_owner_with_many_runs_does_not_keep_another_waiting() -> None:
    many = [operation(f"a{number}", 1, "forward_backward") for number in range(50)]
    queue = opened(*many, operation("b", 1, "forward_backward", owner="bob"))
    assert "b:1" in [ids(queue.take_batch())[0] for _ in range(2)]


def test_a_gap_that_lasts_is_found_and_given_up() -> None:
    queue = opened(operation("a", 2), operation("a", 4))
    assert queue.gaps(100.0, 10.0) == []
    [stuck] = queue.gaps(111.0, 10.0)
    assert ids(stuck.abandon_gap()) == ["a:2", "a:4"]
    queue.add(operation("a", 5))
    assert ids(queue.take_batch()) == ["a:5"]


def test_a_gap_that_closes_is_forgotten() -> None:
    queue = opened(operation("a", 2))
    queue.gaps(100.0, 10.0)
    queue.add(operation("a", 1))
    assert queue.gaps(105.0, 10.0) == []
    [first] = queue.take_batch()
    queue.settled(first)
    queue.add(operation("a", 4))
    [second] = queue.take_batch()
    queue.settled(second)
    assert queue.gaps(112.0, 10.0) == []


def test_turns_go_round_the_owners() -> None:
    turns = Turns()
    for key in ("a1", "a2", "a3"):
        turns.add("alice", key)
    turns.add("bob", "b1")
    turns.add("alice", "a1")
    assert (len(turns), turns.count("alice"), turns.count("bob")) == (4, 3, 1)
    assert [turns.take() for _ in range(5)] == ["a1", "b1", "a2", "a3", None]


def test_the_place_of_a_key_is_how_many_of_its_owner_come_before_it() -> None:
    turns = Turns()
    for number in range(6):
        turns.add("alice" if number % 2 else "bob", str(number))
    assert [turns.before("alice", key) for key in ("1", "3", "5")] == [0, 1, 2]
    turns.remove("alice", "3")
    assert turns.before("alice", "5") == 1
    assert turns.take() == "0"
    assert turns.before("bob", "4") == 1
    turns.put_back("bob", "0")
    assert [turns.before("bob", key) for key in ("0", "2", "4")] == [0, 1, 2]
    assert turns.before("bob", "unknown") == 0
