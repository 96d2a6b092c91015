"""A number that is used again: what is sent again is the first one, anything else is refused by name."""

from __future__ import annotations

import time
from typing import Any

import httpx
import zstandard

from tests.gateway.conftest import begin_run, clean, json_datum, outcome, send_pass, send_step
from tests.served import ServedGateway

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def save(http: httpx.Client, run: str, seq_id: int, **fields: Any) -> dict[str, Any]:
    body = {"model_id": run, "seq_id": seq_id, **fields}
    promise = http.post("/api/v1/save_weights_for_sampler", json=body).json()
    return outcome(http, promise["request_id"])


def score(http: httpx.Client, sampler: str, seq_id: int) -> list[float]:
    """What a sampler's weights make of a prompt."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"tokens": TOKENS}]},
        "sampling_params": {"max_tokens": 1, "seed": 1},
        "prompt_logprobs": True,
    }
    promise = http.post("/api/v1/asample", json=body).json()
    scores: list[float] = outcome(http, promise["request_id"])["prompt_logprobs"]
    return scores


def train(http: httpx.Client, run: str, seq_id: int) -> None:
    send_pass(http, run, seq_id, TOKENS)
    assert "error" not in outcome(
        http, send_step(http, run, seq_id + 1, learning_rate=0.3).json()["request_id"]
    )


def test_newer_weights_do_not_get_the_number_of_older_ones(http: httpx.Client, served: ServedGateway) -> None:
    """They would be sampled as the older ones. Their files go, the number stays, and the run goes on."""
    run = begin_run(http)
    first = save(http, run, 1, sampling_session_seq_id=0)["sampling_session_id"]
    before = score(http, first, 0)
    train(http, run, 2)
    files = served.data_dir / "storage" / "checkpoints"
    folders = set(files.iterdir())
    for seq_id, more in ((4, {}), (5, {"kind": "inflight"})):
        taken = save(http, run, seq_id, sampling_session_seq_id=0, **more)
        assert taken["category"] == "user", taken
        assert "sampling_session_seq_id is 0" in taken["error"]
        assert run in taken["error"]
        assert save(http, run, seq_id, sampling_session_seq_id=0, **more) == taken
    deadline = time.monotonic() + 20
    while set(files.iterdir()) != folders:
        assert time.monotonic() < deadline, "what a refused save has written stays"
        time.sleep(0.05)
    assert score(http, first, 1) == before
    newer = save(http, run, 6, sampling_session_seq_id=1)["sampling_session_id"]
    assert score(http, newer, 0) != before
    assert save(http, run, 1, sampling_session_seq_id=0)["sampling_session_id"] == first


def test_a_used_number_of_a_sampler_is_that_sampler_or_refused(http: httpx.Client) -> None:
    run = begin_run(http)
    session = run.split(":")[0]
    paths = [save(http, run, n, path=f"p{n}")["path"] for n in (1, 2)]
    save(http, run, 3, sampling_session_seq_id=0)

    def create(number: int, **weights: str) -> httpx.Response:
        body = {"session_id": session, "sampling_session_seq_id": number, **weights}
        return http.post("/api/v1/create_sampling_session", json=body)

    first = {1: {"model_path": paths[0]}, 2: {"base_model": "fake/model"}}
    for number, weights in first.items():
        assert create(number, **weights).status_code == 200
    refused = [
        (0, {"base_model": "fake/model"}, "model_path"),
        (0, {"model_path": paths[0]}, "model_path"),
        (1, {"model_path": paths[1]}, "model_path"),
        (1, {"base_model": "fake/model"}, "model_path"),
        (1, {"model_path": paths[0], "base_model": "no/such"}, "base_model"),
        (2, {"model_path": paths[0]}, "model_path"),
        (2, {"base_model": "no/such"}, "base_model"),
        (2, {}, "base_model"),
    ]
    for number, weights, field in refused:
        answer = create(number, **weights)
        detail = clean(answer)["detail"]
        assert (answer.status_code, detail.startswith(field)) == (422, True), detail
        assert f"sampler {number} " in detail
    run_id, kind, name = paths[0].removeprefix("tinker://").split("/")
    assert http.delete(f"/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}").status_code == 200
    for number, weights in first.items():
        again = create(number, **weights)
        assert again.json()["sampling_session_id"] == f"{session}:sample:{number}"
    taken = save(http, run, 4, sampling_session_seq_id=1)
    assert taken["category"] == "user" and paths[0] in taken["error"]


def refused(answer: httpx.Response, *words: str) -> None:
    detail = clean(answer)["detail"]
    assert answer.status_code == 422, answer.text
    for word in words:
        assert word in detail


def test_another_operation_under_a_used_number_is_refused(http: httpx.Client, served: ServedGateway) -> None:
    """While the first waits, when it is settled, and after a restart; it would be a success that did nothing."""
    run = begin_run(http)

    def others() -> None:
        refused(send_step(http, run, 1), "seq_id", "number 1 of", "forward_backward", "optim_step")
        refused(send_step(http, run, 1, learning_rate="fast"), "seq_id", "number 1 of")
        refused(send_pass(http, run, 1, TOKENS[1:]), "seq_id", "number 1 of")
        refused(send_pass(http, run, 2, TOKENS), "seq_id", "number 2 of", "optim_step", "forward_backward")
        body = {"model_id": run, "seq_id": 1, "path": "kept"}
        for route in ("save_weights", "save_weights_for_sampler", "load_weights", "of_a_newer_sdk"):
            refused(http.post(f"/api/v1/{route}", json=body), "seq_id", "number 1 of")

    promises = [send_step(http, run, 2).json(), send_pass(http, run, 1, TOKENS).json()]
    others()
    results = [outcome(http, promise["request_id"]) for promise in promises]
    assert not any("error" in result for result in results)
    others()
    served.kill()
    served.start()
    others()
    assert [send_step(http, run, 2).json(), send_pass(http, run, 1, TOKENS).json()] == promises
    assert [outcome(http, promise["request_id"]) for promise in promises] == results
    assert "error" not in outcome(http, send_step(http, run, 3).json()["request_id"])


def test_what_is_sent_again_compressed_is_the_same(http: httpx.Client) -> None:
    run = begin_run(http)
    given = {"data": [json_datum(TOKENS)], "loss_fn": "cross_entropy"}
    request = http.build_request(
        "POST",
        "/api/v1/forward_backward",
        json={"model_id": run, "seq_id": 1, "forward_backward_input": given},
    )
    first = http.send(request).json()
    for level in (1, 19):
        packed = zstandard.ZstdCompressor(level=level).compress(request.read())
        headers = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
        assert http.post("/api/v1/forward_backward", content=packed, headers=headers).json() == first


def test_a_rejected_operation_that_is_sent_again_is_rejected_again(http: httpx.Client) -> None:
    """And one that was accepted stays so, even if it would be rejected now."""
    run = begin_run(http)
    path = save(http, run, 1, path="p")["path"]
    load = {"model_id": run, "seq_id": 2, "path": path}
    first = http.post("/api/v1/load_weights", json=load).json()
    assert "error" not in outcome(http, first["request_id"])
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    assert http.delete(f"/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}").status_code == 200
    assert http.post("/api/v1/load_weights", json=load).json() == first
    rejected = [http.post("/api/v1/load_weights", json={**load, "seq_id": 3}).json() for _ in range(2)]
    assert rejected[0] == rejected[1]
    assert outcome(http, rejected[0]["request_id"])["category"] == "user"
    refused(send_step(http, run, 3), "number 3 of", "load_weights", "optim_step")


def test_another_sample_or_run_under_a_used_number_is_refused(http: httpx.Client) -> None:
    run = begin_run(http)
    session = run.split(":")[0]
    path = save(http, run, 1, path="p")["path"]
    sampler = save(http, run, 2, sampling_session_seq_id=0)["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": 5,
        "prompt": {"chunks": [{"tokens": TOKENS}]},
        "sampling_params": {"max_tokens": 4},
    }
    first = http.post("/api/v1/asample", json=body).json()
    assert http.post("/api/v1/asample", json=body).json() == first
    for change in ({"num_samples": 2}, {"num_samples": -1}, {"prompt": "text"}):
        refused(http.post("/api/v1/asample", json={**body, **change}), "seq_id", f"number 5 of {sampler}")
    fresh = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model", "lora_config": {"rank": 8}}
    begun = {"session_id": session, "model_seq_id": 1, "path": path}
    assert http.post("/api/v1/load_weights", json=begun).json()["model_id"] == f"{session}:train:1"
    assert http.post("/api/v1/load_weights", json=begun).json()["model_id"] == f"{session}:train:1"
    refused(http.post("/api/v1/create_model", json=fresh), "model_seq_id", f"run {run}")
    refused(http.post("/api/v1/create_model", json={**fresh, "model_seq_id": 1}), "model_seq_id")
    refused(http.post("/api/v1/load_weights", json={**begun, "model_seq_id": 0}), "model_seq_id")


def test_another_operation_with_a_used_key_is_refused(http: httpx.Client) -> None:
    """Of clients that number nothing."""
    run = begin_run(http)
    body = {"model_id": run, "adam_params": {"learning_rate": 0.1}}
    headers = {"X-Idempotency-Key": "k"}
    first, again = (http.post("/api/v1/optim_step", json=body, headers=headers).json() for _ in range(2))
    assert first == again
    body["adam_params"] = {"learning_rate": 0.2}
    refused(http.post("/api/v1/optim_step", json=body, headers=headers), "X-Idempotency-Key", run)


def test_an_unnamed_save_that_is_sent_again_may_name_another_sampler(http: httpx.Client) -> None:
    """As the SDK does; it is the first one. A named one, or one of another kind, is another operation."""
    run = begin_run(http)
    body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 3, "kind": "snapshot"}
    first, again = (
        http.post("/api/v1/save_weights_for_sampler", json={**body, "sampling_session_seq_id": number}).json()
        for number in (3, 4)
    )
    assert first == again
    assert outcome(http, first["request_id"])["sampling_session_id"].endswith(":sample:3")
    others = ({"kind": "inflight"}, {"path": "named", "sampling_session_seq_id": None})
    for other in others:
        answer = http.post("/api/v1/save_weights_for_sampler", json={**body, **other})
        refused(answer, "seq_id", "number 1 of")
