"""SDKs up to 0.2: no sessions, no numbers. Operations take effect as they arrive, once each, by their key."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.conftest import json_datum, outcome
from tests.served import ServedGateway

TOKENS = [5, 9, 40, 41, 7, 100]


def post(http: httpx.Client, path: str, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """A call that is accepted, and what comes of it."""
    headers = {"X-Idempotency-Key": key} if key is not None else {}
    answer = http.post(f"/api/v1/{path}", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    promise: dict[str, Any] = answer.json()
    return promise


def begin(http: httpx.Client, key: str | None = None) -> str:
    body = {"base_model": "fake/model", "lora_config": {"rank": 4, "seed": 1}, "type": "create_model"}
    promise = post(http, "create_model", body, key)
    run_id = str(outcome(http, promise["request_id"])["model_id"])
    assert run_id == promise["model_id"]
    return run_id


def train(http: httpx.Client, run_id: str, key: str) -> dict[str, Any]:
    """One pass and one step."""
    given = {"data": [json_datum(TOKENS)], "loss_fn": "cross_entropy"}
    passed = post(http, "forward_backward", {"model_id": run_id, "forward_backward_input": given}, f"{key}:0")
    stepped = post(
        http, "optim_step", {"model_id": run_id, "adam_params": {"learning_rate": 0.01}}, f"{key}:1"
    )
    assert "metrics" in outcome(http, stepped["request_id"])
    return passed


def loss(http: httpx.Client, run_id: str) -> float:
    given = {"data": [json_datum(TOKENS)], "loss_fn": "cross_entropy"}
    promise = post(http, "forward", {"model_id": run_id, "forward_input": given})
    return float(outcome(http, promise["request_id"])["metrics"]["loss:sum"])


def test_a_run_begins_once_for_a_key(http: httpx.Client) -> None:
    assert begin(http, "the same") == begin(http, "the same")
    assert begin(http) != begin(http)


def test_an_operation_that_is_sent_again_is_applied_once(http: httpx.Client) -> None:
    """Against a run that numbers the same operations, each sent once."""
    run_id, numbered = begin(http), begin(http)
    for key in ("a", "b"):
        first, again = train(http, run_id, key), train(http, run_id, key)
        assert first == again
        train(http, numbered, f"{numbered}{key}")
    assert loss(http, run_id) == loss(http, numbered)
    assert loss(http, run_id) < loss(http, begin(http))


def test_the_same_key_in_two_runs_is_two_operations(http: httpx.Client) -> None:
    one, two = begin(http), begin(http)
    assert train(http, one, "k")["request_id"] != train(http, two, "k")["request_id"]
    assert loss(http, one) == loss(http, two) < loss(http, begin(http))


def test_keys_are_remembered_over_a_restart(http: httpx.Client, served: ServedGateway) -> None:
    run_id = begin(http)
    first = train(http, run_id, "k")
    after_one = loss(http, run_id)
    served.kill()
    served.start()
    assert train(http, run_id, "k") == first
    assert loss(http, run_id) == pytest.approx(after_one, rel=1e-6)


def test_operations_without_a_number_follow_those_with_one(http: httpx.Client) -> None:
    run_id = begin(http)
    step = {"model_id": run_id, "adam_params": {}}
    for seq_id in (1, 2):
        assert post(http, "optim_step", {**step, "seq_id": seq_id})["request_id"] == f"{run_id}:{seq_id}"
    train(http, run_id, "k")
    taken = http.post("/api/v1/optim_step", json={**step, "seq_id": 3})
    assert taken.status_code == 400
    assert "one client at a time numbers" in taken.text
    assert "metrics" in outcome(http, post(http, "optim_step", {**step, "seq_id": 5})["request_id"])


def test_weights_are_saved_and_loaded_without_numbers(http: httpx.Client) -> None:
    run_id = begin(http)
    train(http, run_id, "k")
    saved = outcome(http, post(http, "save_weights", {"model_id": run_id, "path": "one"})["request_id"])
    other = begin(http)
    loaded = post(http, "load_weights", {"model_id": other, "path": saved["path"]}, "load")
    assert outcome(http, loaded["request_id"])["path"] == saved["path"]
    assert loss(http, other) == pytest.approx(loss(http, run_id), rel=1e-6)


def sample(http: httpx.Client, key: str | None = None, **weights: str) -> dict[str, Any]:
    prompt = {"chunks": [{"tokens": TOKENS, "type": "encoded_text"}]}
    params = {"max_tokens": 4, "seed": None, "temperature": 1, "top_k": -1, "top_p": 1}
    body = {"num_samples": 1, "prompt": prompt, "sampling_params": params, "prompt_logprobs": True, **weights}
    promise = post(http, "asample", body, key)
    result = outcome(http, promise["request_id"])
    assert result["type"] == "sample", result
    return {**promise, **result}


def test_a_sample_names_its_weights(http: httpx.Client) -> None:
    run_id = begin(http)
    train(http, run_id, "k")
    promise = post(http, "save_weights_for_sampler", {"model_id": run_id, "path": "s"})
    path = outcome(http, promise["request_id"])["path"]
    tuned = sample(http, model_path=path)
    assert -sum(tuned["prompt_logprobs"][1:]) == pytest.approx(loss(http, run_id), rel=1e-5)
    plain = sample(http, base_model="fake/model")
    assert -sum(plain["prompt_logprobs"][1:]) == pytest.approx(loss(http, begin(http)), rel=1e-5)


def test_a_sample_that_is_sent_again_is_the_same(http: httpx.Client) -> None:
    """Its seed is drawn by the server: another sample would differ."""
    one, again = (sample(http, "the same", base_model="fake/model") for _ in range(2))
    assert one == again
    others = [sample(http, base_model="fake/model") for _ in range(4)]
    assert len({str(other["sequences"]) for other in others}) > 1
    assert len({other["request_id"] for other in [one, *others]}) == 5


@pytest.mark.parametrize(
    ("weights", "status", "said"),
    [
        ({}, 400, "base_model or model_path"),
        ({"base_model": "no/model"}, 404, "no/model"),
        ({"model_path": "tinker://x/sampler_weights/y"}, 404, "tinker://x/sampler_weights/y"),
        ({"sampling_session_id": "x:sample:0", "base_model": "fake/model"}, 400, "base_model"),
    ],
)
def test_weights_that_cannot_be_sampled_are_named(
    http: httpx.Client, weights: dict[str, str], status: int, said: str
) -> None:
    body = {"prompt": {"chunks": [{"tokens": TOKENS}]}, **weights}
    answer = http.post("/api/v1/asample", json=body)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text
