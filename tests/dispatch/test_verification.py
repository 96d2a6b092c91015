"""What counts as the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.messages import Outcome
from gateway.dispatch.verification import difference
from tests.dispatch.test_run_queue import operation


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (3.0, 3.0, True),
        (3.0, 3.0 + 2e-5, True),
        (3.0, 3.0 + 4e-5, False),
        (-3.0, -3.0 - 4e-5, False),
        (1000.0, 1000.009, True),
        (1000.0, 1000.011, False),
        (0.0, 0.0, True),
        (0.0, 1e-6, False),
    ],
)
def test_without_digests_numbers_agree_within_a_tolerance(before: float, now: float, same: bool) -> None:
    for name, kind in (("loss", "forward_backward"), ("grad_norm", "optim_step")):
        recorded = replace(operation("a", 7, kind), measure=before)
        found = difference(recorded, Outcome(summary={name: now, "seconds": 1.0}))
        assert (found is None) == same
        assert found is None or (f"{kind} 7" in found and repr(before) in found and repr(now) in found)


@pytest.mark.parametrize(("tokens", "same"), [(1000.0, True), (100.0, False)])
def test_a_loss_whose_terms_cancel_out_may_differ_by_what_its_terms_may(tokens: float, same: bool) -> None:
    """Advantages of both signs: the sum is near zero, the rounding that of its terms."""
    recorded = replace(operation("a", 7, "forward_backward"), measure=0.001)
    found = difference(recorded, Outcome(summary={"loss": -0.004, "tokens": tokens}))
    assert (found is None) == same


def test_tokens_excuse_no_other_digest() -> None:
    recorded = replace(operation("a", 7, "forward_backward"), measure=0.001, result_digest=b"one")
    assert difference(recorded, Outcome(summary={"loss": 0.001, "tokens": 1e6}, digest=b"two")) is not None


def test_digests_must_be_equal_whatever_the_numbers() -> None:
    recorded = replace(operation("a", 7, "forward_backward"), measure=1.0, result_digest=b"one")
    assert difference(recorded, Outcome(summary={"loss": 1.0}, digest=b"one")) is None
    found = difference(recorded, Outcome(summary={"loss": 1.0}, digest=b"two"))
    assert found == "forward_backward 7: loss 1.0 then, 1.0 now"
    created = replace(operation("a", 0, "create_run"), result_digest=b"one")
    assert difference(created, Outcome(digest=b"two")) == "create_run 0"


def test_what_was_recorded_without_digest_is_compared_by_number() -> None:
    """An engine that was made deterministic since, or is not any more."""
    recorded = replace(operation("a", 7), measure=1.0)
    assert difference(recorded, Outcome(summary={"grad_norm": 1.0}, digest=b"two")) is None
    recorded = replace(recorded, result_digest=b"one")
    assert difference(recorded, Outcome(summary={"grad_norm": 1.0})) is None
    assert difference(recorded, Outcome(summary={"grad_norm": 2.0})) is not None


def test_operations_of_an_older_version_have_nothing_to_compare() -> None:
    assert difference(operation("a", 7), Outcome(summary={"grad_norm": 1.0}, digest=b"two")) is None
