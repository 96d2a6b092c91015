"""A client that is newer than this gateway works for all that it did before."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.conftest import begin_run, json_datum, outcome
from tests.served import ServedGateway

HEADERS = {"X-Stainless-Package-Version": "7.1.0", "X-Sdk-Version": "7.1.0", "X-Tinker-Something": "new"}
IDLE: dict[str, Any] = {
    "a_new_field": None,
    "another": False,
    "third": 0,
    "fourth": [],
    "fifth": {},
    "sixth": "",
}


@pytest.fixture
def newer(http: httpx.Client) -> httpx.Client:
    """Sends headers that nothing here knows."""
    http.headers.update(HEADERS)
    return http


def call(http: httpx.Client, route: str, /, **body: Any) -> dict[str, Any]:
    """What comes of a call whose body has fields that ask for nothing."""
    answer = http.post(f"/api/v1/{route}", json={**IDLE, **body})
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return outcome(http, reply["request_id"]) if "request_id" in reply else reply


def test_fields_that_ask_for_nothing_change_nothing(newer: httpx.Client) -> None:
    assert call(newer, "client/config", sdk_version="7.1.0") is not None
    assert call(newer, "client/dynamic_config", sdk_version="7.1.0") is not None
    session_id = call(newer, "create_session", sdk_version="7.1.0")["session_id"]
    lora = {"rank": 4, "seed": 1, **IDLE}
    made = call(
        newer,
        "create_model",
        session_id=session_id,
        model_seq_id=0,
        base_model="fake/model",
        lora_config=lora,
    )
    run_id = made["model_id"]
    data = [{**json_datum([5, 9, 40, 41]), **IDLE}]
    given = {"data": data, "loss_fn": "cross_entropy", **IDLE}
    passed = call(newer, "forward_backward", model_id=run_id, seq_id=1, forward_backward_input=given)
    assert passed["metrics"]["loss:sum"] > 0
    adam = {"learning_rate": 0.01, **IDLE}
    stepped = call(newer, "optim_step", model_id=run_id, seq_id=2, adam_params=adam)
    assert stepped["metrics"]["unclipped_grad_l2:mean"] > 0
    saved = call(newer, "save_weights", model_id=run_id, seq_id=3, path="one")
    assert saved["path"] == f"tinker://{run_id}/weights/one"
    sampler = call(newer, "create_sampling_session", session_id=session_id, sampling_session_seq_id=0,
                   model_path=saved["path"])["sampling_session_id"]  # fmt: skip
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 9], **IDLE}], **IDLE}
    params = {"max_tokens": 2, **IDLE}
    sampled = call(
        newer, "asample", sampling_session_id=sampler, seq_id=0, prompt=prompt, sampling_params=params
    )
    assert len(sampled["sequences"]) == 1


def test_a_field_that_asks_for_something_is_refused_by_name(newer: httpx.Client) -> None:
    run_id = begin_run(newer)
    refused = call(newer, "optim_step", model_id=run_id, seq_id=1, adam_params={"warmup": 0.5})
    assert refused["category"] == "user"
    assert "warmup" in refused["error"]


def test_an_operation_that_is_not_served_consumes_its_number(newer: httpx.Client) -> None:
    """Its sender goes on with the next one, which must not wait."""
    run_id = begin_run(newer)
    refused = call(newer, "merge_weights", model_id=run_id, seq_id=1, how="new")
    assert refused["category"] == "user"
    assert "merge_weights is not served here" in refused["error"]
    assert "metrics" in call(newer, "optim_step", model_id=run_id, seq_id=2)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["something/new", "asample/7", "healthz/x"])
def test_a_route_that_is_not_served_is_404(newer: httpx.Client, method: str, path: str) -> None:
    """Not 405, which SDKs take for a broken server."""
    answer = newer.request(method, f"/api/v1/{path}", json={"a": 1} if method != "GET" else None)
    assert answer.status_code == 404
    assert f"{method} /api/v1/{path}" in answer.json()["detail"]


def test_nobody_needs_a_key_to_learn_that_there_is_nothing(served: ServedGateway) -> None:
    assert httpx.get(f"{served.url}/api/v1/something/new").status_code == 404


def test_another_owners_run_is_not_found(newer: httpx.Client) -> None:
    answer = newer.post("/api/v1/merge_weights", json={"model_id": "nobody:train:0", "seq_id": 1})
    assert answer.status_code == 404
