"""The metrics of a run by step are what its client computes from the results it was given."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import httpx
import pytest

from tests.admin.conftest import Place, finish
from tests.gateway.conftest import begin_run, json_datum, outcome, send_pass, send_step

STEPS = [[[3, 1, 4, 1, 5]], [[9, 2, 6], [5, 3, 5, 8]], [], [[7, 9, 3, 2, 3, 8]]]
"""Tokens of each pass before each step: one pass, two, none, one."""


class Seen(NamedTuple):
    """One step, as its client knows it."""

    seq_id: int
    loss: float
    tokens: int
    grad_norm: float | None
    learning_rate: float


def metrics(http: httpx.Client, run_id: str, **where: Any) -> list[dict[str, Any]]:
    answer = http.get(f"/admin/v1/runs/{run_id}/metrics", params=where)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()
    return rows


@pytest.fixture(scope="package")
def trained(place: Place) -> tuple[str, list[Seen]]:
    """A run, and what its client saw: for each step its number in the order, loss, tokens, norm and rate."""
    with place.client("carol") as http:
        run_id = begin_run(http, seed=9)
        seq_id, seen = 1, list[Seen]()
        for number, passes in enumerate(STEPS):
            loss = 0.0
            for tokens in passes:
                loss += finish(http, send_pass(http, run_id, seq_id, tokens))["metrics"]["loss:sum"]
                seq_id += 1
            refused = send_pass(http, run_id, seq_id, [1, 2, 3], loss_fn="no_such_loss")
            if refused.status_code == 200:  # its number is used, and nothing else has changed
                assert "error" in outcome(http, refused.json()["request_id"])
                seq_id += 1
            rate = 0.01 / (number + 1)
            result = finish(http, send_step(http, run_id, seq_id, learning_rate=rate))
            norm = (result.get("metrics") or {}).get("unclipped_grad_l2:mean")
            count = sum(len(tokens) - 1 for tokens in passes)
            seen.append(Seen(seq_id, loss, count, norm, rate))
            seq_id += 1
        return run_id, seen


def test_each_step_is_what_the_client_computed(trained: tuple[str, list[Seen]], carol: httpx.Client) -> None:
    run_id, seen = trained
    rows = metrics(carol, run_id)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(rows, seen, strict=True):
        assert row["seq_id"] == expected.seq_id
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-9)
        assert row["tokens"] == expected.tokens
        assert row["learning_rate"] == expected.learning_rate
        assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-9)
        per_token = None if not expected.tokens else expected.loss / expected.tokens
        assert row["loss_per_token"] == (None if per_token is None else pytest.approx(per_token, rel=1e-9))
        assert 0 < row["seconds"] < 60
    finished = [datetime.fromisoformat(row["finished_at"]) for row in rows]
    assert finished == sorted(finished)
    assert carol.get(f"/admin/v1/runs/{run_id}").json()["step"] == 4


def test_metrics_come_in_parts(trained: tuple[str, list[Seen]], carol: httpx.Client) -> None:
    rows = metrics(carol, trained[0])
    assert metrics(carol, trained[0], limit=3) == rows[:3]
    assert metrics(carol, trained[0], after=3) == rows[3:]
    assert metrics(carol, trained[0], after=1, limit=2) == rows[1:3]
    assert metrics(carol, trained[0], after=4) == []


def test_a_pass_without_gradient_is_not_counted(carol: httpx.Client) -> None:
    run_id = begin_run(carol, seed=10)
    given = {"data": [json_datum([1, 2, 3])], "loss_fn": "cross_entropy"}
    body = {"model_id": run_id, "seq_id": 1, "forward_input": given}
    assert finish(carol, carol.post("/api/v1/forward", json=body))["metrics"]["loss:sum"] > 0
    loss = finish(carol, send_pass(carol, run_id, 2, [5, 6, 7]))["metrics"]["loss:sum"]
    finish(carol, send_step(carol, run_id, 3))
    [row] = metrics(carol, run_id)
    assert (row["loss"], row["tokens"]) == (pytest.approx(loss, rel=1e-9), 2)


def test_a_fresh_run_has_none(carol: httpx.Client) -> None:
    assert metrics(carol, begin_run(carol, seed=11)) == []
