"""A number that is used again: what is sent again is the first one, anything else is refused by name."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.gateway.conftest import begin_run, clean, outcome, send_pass, send_step
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
