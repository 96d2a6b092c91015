"""An operator takes an engine away that runs were made on: what needs it says so, all else goes on."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.gateway.conftest import KEY, begin_run, clean, outcome, send_pass, send_step
from tests.served import FAKE_ENGINE, ServedGateway

TOKENS = [3, 1, 4, 1, 5]


def test_runs_of_an_engine_that_is_gone(tmp_path: Path) -> None:
    first = ServedGateway(tmp_path)
    second = ServedGateway(tmp_path, [{**FAKE_ENGINE, "name": "other"}])
    try:
        first.start()
        with httpx.Client(base_url=first.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            run_id = begin_run(http)
            save = {"model_id": run_id, "seq_id": 1, "path": "kept"}
            promise = http.post("/api/v1/save_weights", json=save).json()
            path = outcome(http, promise["request_id"])["path"]
        first.stop()
        second.start()
        with httpx.Client(base_url=second.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            _see_what_is_left(http, run_id, path)
    finally:
        first.close()
        second.close()


def _see_what_is_left(http: httpx.Client, run_id: str, path: str) -> None:
    session_id = run_id.partition(":")[0]
    answers = [
        send_step(http, run_id, 2),
        http.post("/api/v1/get_info", json={"model_id": run_id}),
    ]
    for answer in answers:
        assert answer.status_code == 404
        assert "engine 'fake'" in clean(answer)["detail"]
        assert "there are other" in answer.json()["detail"]
    assert http.get(f"/api/v1/training_runs/{run_id}").json()["training_run_id"] == run_id
    load = {"session_id": session_id, "model_seq_id": 1, "path": path}
    promise = http.post("/api/v1/load_weights", json=load).json()
    assert outcome(http, promise["request_id"])["type"] == "load_weights"
    loaded = send_pass(http, promise["model_id"], 1, TOKENS).json()
    assert outcome(http, loaded["request_id"])["metrics"]["loss:sum"] > 0
    for route, body in (("unload_model", {"model_id": run_id}), (f"sessions/{session_id}/finish", {})):
        assert http.post(f"/api/v1/{route}", json=body).status_code == 200
