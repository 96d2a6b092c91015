"""Runs that cannot be made, numbers and names at their limits, and what is tolerated."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import begin_run, clean, outcome, send_pass, send_step

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def creation(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    """The answer to create_model, or what becomes of it."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model", "lora_config": {"rank": 4}}
    answer = clean(http.post("/api/v1/create_model", json=body | changes))
    return outcome(http, answer["request_id"]) if "request_id" in answer else answer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_config": {"rank": 0}}, ["rank", "0"]),
        ({"lora_config": {"rank": -3}}, ["rank", "-3"]),
        ({"lora_config": {"rank": 10**9}}, ["rank", "1000000000", "64"]),
        ({"lora_config": {"rank": 10**18}}, ["rank"]),
        ({"lora_config": {"rank": 4.5}}, ["rank"]),
        (
            {"lora_config": {"train_attn": False, "train_mlp": False, "train_unembed": False}},
            ["train_attn", "nothing to train"],
        ),
        ({"lora_config": {"alpha": 64}}, ["alpha"]),
        ({"lora_config": {"seed": 2**64}}, ["seed", "64 bits"]),
        ({"lora_config": {"seed": -(2**63) - 1}}, ["seed", "64 bits"]),
        ({"lora_config": {"seed": 1.5}}, ["seed"]),
        ({"base_model": "no/such"}, ["base model", "no/such", "fake/model"]),
        ({"base_model": ""}, ["base_model"]),
        ({"base_model": "n" * 301}, ["base_model"]),
        ({"session_id": "nobody's"}, ["there is no session"]),
        ({"session_id": "a\0b"}, ["there is no session"]),
        ({"model_seq_id": -1}, ["model_seq_id"]),
        ({"model_seq_id": 2**63}, ["model_seq_id"]),
        ({"optimizer_config": {"type": "muon"}}, ["optimizer_config", "muon", "adamw"]),
        ({"optimizer_config": {"type": "adamw", "foreach": True}}, ["optimizer_config", "foreach"]),
        ({"quantization": "int4"}, ["quantization"]),
        ({"user_metadata": {"a": "\0"}}, ["user_metadata", "NUL"]),
        ({"user_metadata": {"a\0": 1}}, ["user_metadata", "NUL"]),
        ({"user_metadata": {"a": "x" * 100_000}}, ["user_metadata", "bytes"]),
        ({"user_metadata": json.loads('{"a":' * 300 + "1" + "}" * 300)}, ["user_metadata", "nested"]),
    ],
)
def test_a_run_that_cannot_be_made(http: httpx.Client, changes: dict[str, Any], words: list[str]) -> None:
    answer = creation(http, **changes)
    sentence = answer.get("error") or answer["detail"]
    for word in words:
        assert word in sentence
    assert creation(http)["type"] == "create_model"


def test_what_asks_for_nothing_is_tolerated(http: httpx.Client) -> None:
    """A newer SDK sends fields that this server does not know; empty ones change nothing."""
    tolerated: dict[str, Any] = {
        "new_flag": None,
        "new_list": [],
        "new_switch": False,
        "type": "forward_backward_input",
    }
    run_id = begin_run(http)
    plain, adorned = (send_pass(http, run_id, n, TOKENS, **more) for n, more in ((1, {}), (2, tolerated)))
    results = [outcome(http, promise.json()["request_id"])["metrics"] for promise in (plain, adorned)]
    assert results[0]["loss:sum"] == results[1]["loss:sum"] > 0
    session = http.post("/api/v1/create_session", json={"brand_new": {"anything": 1}})
    assert session.status_code == 200


def test_extreme_numbers_that_are_allowed(http: httpx.Client) -> None:
    assert creation(http, lora_config={"rank": 1, "seed": 2**64 - 1})["type"] == "create_model"
    assert creation(http, lora_config={"rank": 64, "seed": -(2**63)})["type"] == "create_model"
    assert creation(http, model_seq_id=2**63 - 1)["type"] == "create_model"


def test_the_largest_number_of_an_operation_ends_the_run_and_no_other(http: httpx.Client) -> None:
    """Behind it there is no number left; the store must not trip over that."""
    run_id = begin_run(http)
    last = send_pass(http, run_id, 2**31 - 1, TOKENS)
    failed = outcome(http, last.json()["request_id"])
    assert (failed["category"], "operation 1 " in failed["error"]) == ("user", True)
    late = outcome(http, send_pass(http, run_id, 1, TOKENS).json()["request_id"])
    assert "came after" in late["error"]
    assert (
        outcome(http, send_pass(http, begin_run(http), 1, TOKENS).json()["request_id"])["metrics"]["loss:sum"]
        > 0
    )


def test_huge_headers_are_no_matter(http: httpx.Client) -> None:
    many = {f"x-header-{number}": "v" for number in range(1000)}
    assert http.get("/api/v1/training_runs", headers=many).status_code in (200, 400, 431)
    again = http.get("/api/v1/training_runs", headers={"authorization": "Bearer " + "k" * 50_000})
    assert again.status_code in (200, 400, 431)
    long = http.post("/api/v1/create_session", json={}, headers={"x-idempotency-key": "k" * 20_000})
    assert long.status_code == 400
    assert "X-Idempotency-Key" in long.json()["detail"]
    assert http.get("/api/v1/training_runs").status_code == 200


def test_an_operation_of_an_unloaded_run_is_gone(http: httpx.Client) -> None:
    run_id = begin_run(http)
    http.post("/api/v1/unload_model", json={"model_id": run_id})
    answer = send_step(http, run_id, 1)
    assert answer.status_code == 410
    assert "unloaded" in clean(answer)["detail"]
