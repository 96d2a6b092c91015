"""Inputs in memory: bounded, taken once, all or none."""

from __future__ import annotations

from gateway.dispatch.inputs import RecentInputs


def test_inputs_are_given_once() -> None:
    inputs = RecentInputs(100)
    inputs.add("a", b"one")
    inputs.add("b", b"two")
    assert inputs.take(["a", "b"]) == {"a": b"one", "b": b"two"}
    assert inputs.take(["a", "b"]) is None


def test_one_that_is_missing_means_that_all_are_read_again() -> None:
    inputs = RecentInputs(100)
    inputs.add("a", b"one")
    assert inputs.take(["a", "b"]) is None
    inputs.add("b", b"two")
    assert inputs.take(["a", "b"]) is None  # neither of the two was left behind


def test_what_does_not_fit_is_not_kept_and_room_comes_back() -> None:
    inputs = RecentInputs(10)
    inputs.add("a", b"12345678")
    inputs.add("b", b"12345678")
    assert inputs.take(["b"]) is None
    assert inputs.discard("a") == b"12345678"
    assert inputs.discard("a") is None
    inputs.add("b", b"12345678")
    inputs.add("b", b"again")  # a repetition of a submit does not count twice
    inputs.add("c", b"90")
    assert inputs.take(["b", "c"]) == {"b": b"12345678", "c": b"90"}


def test_clearing_frees_everything() -> None:
    inputs = RecentInputs(4)
    inputs.add("a", b"1234")
    inputs.clear()
    inputs.add("b", b"1234")
    assert inputs.take(["b"]) == {"b": b"1234"}
