"""What is next: logs in order, owners in turn, nothing twice."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from gateway.dispatch.run_queue import RunQueue, TrainingQueue, Turns, Weigh
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


def weigh(future: Future) -> float:
    """Steps are light; a pass fills a call, but for those of run "light"."""
    return 1 / 64 if future.kind == "optim_step" else 0.5 if "light" in (future.run_id or "") else 1.0


def ids(batch: list[Future]) -> list[str]:
    return [future.request_id for future in batch]


def test_a_log_is_taken_in_order_one_at_a_time() -> None:
    queue = opened(operation("a", 2), operation("a", 1))
    first = queue.take_batch(weigh)
    assert ids(first) == ["a:1"]
    assert queue.take_batch(weigh) == []
    queue.settled(first[0])
    assert ids(queue.take_batch(weigh)) == ["a:2"]


def test_a_gap_holds_back_what_is_behind_it() -> None:
    queue = opened(operation("a", 2))
    assert queue.take_batch(weigh) == []
    queue.add(operation("a", 1))
    assert ids(queue.take_batch(weigh)) == ["a:1"]


def test_a_rejected_number_is_passed_over() -> None:
    rejected = replace(operation("a", 1), status=FutureStatus.FAILED)
    queue = opened(operation("a", 2), rejected)
    assert ids(queue.take_batch(weigh)) == ["a:2"]


def test_an_operation_is_queued_once() -> None:
    queue = opened(operation("a", 1), operation("a", 1))
    [first] = queue.take_batch(weigh)
    queue.add(operation("a", 1))
    queue.settled(first)
    queue.add(operation("a", 1))
    assert queue.take_batch(weigh) == []


def test_short_operations_of_different_runs_go_together() -> None:
    queue = opened(operation("a", 1), operation("b", 1), operation("c", 1, "forward_backward"))
    assert ids(queue.take_batch(weigh)) == ["a:1", "b:1"]
    assert ids(queue.take_batch(weigh)) == ["c:1"]


def test_a_call_holds_what_fits_and_keeps_places_in_line() -> None:
    heavy = operation("heavy", 1, "forward_backward")
    light = [operation(f"light{number}", 1, "forward_backward") for number in range(3)]
    queue = opened(light[0], heavy, *light[1:])
    assert ids(queue.take_batch(weigh)) == ["light0:1", "light1:1"]
    assert ids(queue.take_batch(weigh)) == ["heavy:1"]
    assert ids(queue.take_batch(weigh)) == ["light2:1"]


def test_what_was_put_back_to_be_alone_is_alone_though_it_is_light() -> None:
    queue = opened(operation("light0", 1, "forward"), operation("light1", 1, "forward"))
    both = queue.take_batch(weigh)
    for future in both:
        queue.put_back(future, alone=True)
    assert [len(queue.take_batch(weigh)) for _ in both] == [1, 1]


def test_passes_that_fill_a_call_go_alone() -> None:
    queue = opened(operation("a", 1, "forward_backward"), operation("b", 1, "forward_backward"))
    assert ids(queue.take_batch(weigh)) == ["a:1"]
    assert ids(queue.take_batch(weigh)) == ["b:1"]


def test_what_an_engine_died_over_goes_alone() -> None:
    queue = opened(replace(operation("a", 1), deaths=1), operation("b", 1), operation("c", 1))
    assert ids(queue.take_batch(weigh)) == ["a:1"]
    assert ids(queue.take_batch(weigh)) == ["b:1", "c:1"]


def test_an_owner_with_many_runs_does_not_keep_another_waiting() -> None:
    many = [operation(f"a{number}", 1, "forward_backward") for number in range(50)]
    queue = opened(*many, operation("b", 1, "forward_backward", owner="bob"))
    assert "b:1" in [ids(queue.take_batch(weigh))[0] for _ in range(2)]


def taken(queue: TrainingQueue, weigh: Weigh, calls: int) -> Counter[str]:
    """Operations of each owner in so many calls, one after the other."""
    found: Counter[str] = Counter()
    for _ in range(calls):
        for future in queue.take_batch(weigh):
            found[future.owner] += 1
            queue.settled(future)
    return found


def test_owners_get_equal_shares_by_weight_and_not_by_number() -> None:
    """Alice's passes fill half a call each, bob's an eighth: bob gets four for each of hers."""
    weights = {"alice": 0.5, "bob": 0.125}
    queue = opened(
        *(operation(f"a{i}", seq, "forward", "alice") for i in range(8) for seq in range(1, 60)),
        *(operation(f"b{i}", seq, "forward", "bob") for i in range(8) for seq in range(1, 60)),
    )
    found = taken(queue, lambda future: weights[future.owner], 40)
    assert found["alice"] == pytest.approx(40, abs=2)
    assert found["bob"] == pytest.approx(160, abs=8)


@pytest.mark.parametrize("alone", [1.0, 16.0])
def test_a_single_step_beside_a_thousand_is_in_the_next_call(alone: float) -> None:
    """However large it is, however long the other has been waiting, and in whatever the other's are."""
    many = [operation(f"a{i}", seq, "forward_backward") for i in range(20) for seq in range(1, 51)]
    queue = opened(*many)
    taken(queue, weigh, 7)
    in_flight = queue.take_batch(weigh)
    assert {future.owner for future in in_flight} == {"alice"}
    queue.open_run("b", "bob", 1, [operation("b", 1, "forward", owner="bob")])
    for future in in_flight:
        queue.settled(future)
    assert ids(queue.take_batch(lambda future: alone if future.owner == "bob" else weigh(future))) == ["b:1"]


def test_who_stayed_away_has_saved_nothing() -> None:
    queue = opened(*(operation("a", seq, "forward_backward") for seq in range(1, 200)))
    taken(queue, weigh, 100)
    queue.open_run("b", "bob", 1, [operation("b", seq, "forward_backward", "bob") for seq in range(1, 200)])
    assert taken(queue, weigh, 20) == {"alice": 10, "bob": 10}


def test_who_was_given_much_waits_until_others_have_had_as_much() -> None:
    queue = opened(
        *(operation("a", seq, "forward_backward") for seq in range(1, 20)),
        *(operation("b", seq, "forward_backward", "bob") for seq in range(1, 20)),
    )
    order = []
    for _ in range(10):
        [future] = queue.take_batch(lambda future: 4.0 if future.owner == "alice" else 1.0)
        order.append(future.owner)
        queue.settled(future)
    assert order == ["alice", "bob", "bob", "bob", "bob"] * 2


def test_a_gap_that_lasts_is_found_and_given_up() -> None:
    queue = opened(operation("a", 2), operation("a", 4))
    assert queue.gaps(100.0, 10.0) == []
    [stuck] = queue.gaps(111.0, 10.0)
    assert ids(queue.abandon_gap(stuck)) == ["a:2", "a:4"]
    assert queue.gaps(200.0, 10.0) == []
    queue.add(operation("a", 5))
    assert ids(queue.take_batch(weigh)) == ["a:5"]


def test_a_run_whose_gap_was_given_up_may_be_forgotten_before_it_moves_on() -> None:
    queue = opened(operation("a", 2), operation("b", 2))
    queue.gaps(100.0, 10.0)
    queue.abandon_gap(queue.runs["a"])
    queue.forget("a")
    assert [stuck.run_id for stuck in queue.gaps(111.0, 10.0)] == ["b"]
    queue.forget("b")  # something of it waits
    assert set(queue.runs) == {"b"}


def test_a_gap_that_closes_is_forgotten() -> None:
    queue = opened(operation("a", 2))
    queue.gaps(100.0, 10.0)
    queue.add(operation("a", 1))
    assert queue.gaps(105.0, 10.0) == []
    [first] = queue.take_batch(weigh)
    queue.settled(first)
    queue.add(operation("a", 4))
    [second] = queue.take_batch(weigh)
    queue.settled(second)
    assert queue.gaps(112.0, 10.0) == []


class CountedRuns(dict[str, RunQueue]):
    """Run queues, and how often one was looked at."""

    looks = 0

    def __getitem__(self, run_id: str) -> RunQueue:
        self.looks += 1
        return super().__getitem__(run_id)


def test_only_gaps_that_are_due_are_looked_at() -> None:
    queue = opened(*(operation(f"early{number}", 2) for number in range(3)))
    assert queue.gaps(100.0, 10.0) == []
    for number in range(1000):
        queue.open_run(f"late{number}", "bob", 1, [operation(f"late{number}", 2, owner="bob")])
    assert queue.gaps(105.0, 10.0) == []
    queue.runs = runs = CountedRuns(queue.runs)
    assert queue.gaps(109.0, 10.0) == []
    assert runs.looks == 0
    assert [stuck.run_id for stuck in queue.gaps(111.0, 10.0)] == ["early0", "early1", "early2"]
    assert runs.looks == 3
    queue.add(operation("early1", 1))
    assert [stuck.run_id for stuck in queue.gaps(112.0, 10.0)] == ["early0", "early2"]
    assert len(queue.gaps(116.0, 10.0)) == 1002


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
