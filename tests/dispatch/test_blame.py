"""Whom the deaths of an engine are put down to."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from engines.vitals import Doing, Signs
from gateway.dispatch.blame import Blame
from gateway.store.records import Future
from tests.dispatch.test_run_queue import operation

MANY = [f"s{number}" for number in range(20)]


def signs(doing: Doing, seq_id: int = 0) -> Signs:
    return Signs(1, (1, 1), doing, seq_id)


def a_call(deaths: int = 0) -> Future:
    return replace(operation("run", 3), request_id="call", deaths=deaths)


def a_sample(name: str, deaths: int = 0) -> Future:
    return replace(operation("run", 3), request_id=name, run_id=None, sampler_id="s", deaths=deaths)


def test_what_was_under_way_is_counted_and_nothing_that_was_only_there() -> None:
    blame = Blame(2)
    assert blame.died(signs(Doing.TRAINING), ["call"], MANY, 20) == ["call"]
    assert blame.died(signs(Doing.SAMPLING), ["call"], ["s1", "s2"], 2) == ["s1", "s2"]
    for doing in (Doing.NOTHING, Doing.LOADING, Doing.REPLAYING):
        assert blame.died(signs(doing), ["call"], ["s1"], 1) == []


def test_a_call_fails_at_its_second_death_with_an_id_that_the_log_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    blame = Blame(2)
    blame.died(signs(Doing.TRAINING), ["call"], MANY, 20)
    assert blame.worn_out(a_call(deaths=1)) is None
    blame.died(signs(Doing.TRAINING), ["call"], MANY, 20)
    with caplog.at_level(logging.ERROR):
        outcome = blame.worn_out(a_call(deaths=2))
    assert outcome is not None
    assert outcome.error_category == "server"
    assert outcome.error == "the engine died 2 times while it performed this operation"
    assert outcome.error_id
    assert f"error {outcome.error_id}: call failed" in caplog.text


def test_a_call_beside_samples_is_not_quarantined_after_one_death() -> None:
    blame = Blame(2)
    blame.died(signs(Doing.TRAINING), ["call"], MANY, 20)
    assert not blame.suspected(a_call(deaths=1))
    assert blame.suspected(a_call(deaths=2))


def test_few_samples_are_repeated_alone_at_once_and_the_second_death_is_the_last() -> None:
    blame = Blame(2)
    blame.died(signs(Doing.SAMPLING), (), ["s1", "s2"], 2)
    for name in ("s1", "s2"):
        assert blame.suspected(a_sample(name, deaths=1))
        assert blame.worn_out(a_sample(name, deaths=1)) is None
    assert not blame.suspected(a_sample("later"))
    blame.died(signs(Doing.SAMPLING), (), ["s1"], 1)
    assert blame.worn_out(a_sample("s1", deaths=2)) is not None
    assert blame.worn_out(a_sample("s2", deaths=1)) is None


def test_many_samples_are_repeated_together_first_and_none_fails_in_company() -> None:
    blame = Blame(2)
    blame.died(signs(Doing.SAMPLING), (), MANY, 20)
    assert not any(blame.suspected(a_sample(name, deaths=1)) for name in MANY)
    blame.died(signs(Doing.SAMPLING), (), MANY, 20)
    for name in MANY:
        assert blame.suspected(a_sample(name, deaths=2))
        assert blame.worn_out(a_sample(name, deaths=2)) is None
    blame.died(signs(Doing.SAMPLING), (), ["s7"], 1)
    assert blame.worn_out(a_sample("s7", deaths=3)) is not None
    assert blame.worn_out(a_sample("s8", deaths=2)) is None


def test_who_was_alone_once_and_in_company_the_last_time_is_tried_again() -> None:
    blame = Blame(2)
    blame.died(signs(Doing.SAMPLING), (), ["s1"], 1)
    blame.died(signs(Doing.SAMPLING), (), MANY, 20)
    assert blame.worn_out(a_sample("s1", deaths=2)) is None


def test_what_is_never_alone_fails_in_the_end() -> None:
    """Requests of the OpenAI dialect are in the engine too, and are not stored."""
    blame = Blame(2)
    for deaths in range(1, 5):
        blame.died(signs(Doing.SAMPLING), (), ["s1"], 3)
        assert blame.worn_out(a_sample("s1", deaths=deaths)) is None
    blame.died(signs(Doing.SAMPLING), (), ["s1"], 3)
    assert blame.worn_out(a_sample("s1", deaths=5)) is not None


def test_a_run_whose_restoration_kills_at_one_place_is_given_up_and_no_other() -> None:
    blame = Blame(2)
    for _ in range(4):
        blame.died_restoring(signs(Doing.REPLAYING, 2), "run")
    assert blame.worn_out(a_call()) is None
    blame.died_restoring(signs(Doing.REPLAYING, 2), "run")
    outcome = blame.worn_out(a_call())
    assert outcome is not None
    assert "died 5 times while it applied operation 2 again" in str(outcome.error)
    assert blame.worn_out(replace(a_call(), run_id="another")) is None


def test_deaths_at_other_places_or_between_two_replays_do_not_add_up() -> None:
    blame = Blame(2)
    for seq_id in range(20):
        blame.died_restoring(signs(Doing.REPLAYING, seq_id), "run")
        blame.died_restoring(signs(Doing.NOTHING, 5), "run")
    for _ in range(3):
        blame.died_restoring(signs(Doing.REPLAYING, 5), "run")
    assert blame.worn_out(a_call()) is None
    blame.restored("run")
    for _ in range(4):
        blame.died_restoring(signs(Doing.REPLAYING, 5), "run")
    assert blame.worn_out(a_call()) is None
