"""Engines that are stopped, stuck, or fail to start: noticed within a bound, replaced, explained; nobody else pays."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.gateway.conftest import KEY, begin_run, datum, send_pass, send_step
from tests.served import FAKE_ENGINE, ServedGateway

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
STUCK = 252
"""A token that no other data has."""
HANGS = {**FAKE_ENGINE, "options": {"hang_on_token": STUCK}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    quick = {"engine_silence_s": "2", "engine_hang_s": "1.5", "engine_restart_delay_s": "0.05"}
    gateway = ServedGateway(tmp_path_factory.mktemp("stuck"), [HANGS], **quick)
    gateway.start()
    yield gateway
    gateway.close()


@pytest.fixture
def http(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def outcome(http: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    """What becomes of a promise."""
    request_id = response.json()["request_id"]
    while True:
        body: dict[str, Any] = http.post("/api/v1/retrieve_future", json={"request_id": request_id}).json()
        if body.get("type") != "try_again":
            return body


def test_a_stopped_engine_is_replaced_and_clients_see_a_pause(
    gateway: ServedGateway, http: httpx.Client
) -> None:
    run_id = begin_run(http)
    [engine] = gateway.engine_pids()
    os.kill(engine, signal.SIGSTOP)
    stopped_at = time.monotonic()
    result = outcome(http, send_pass(http, run_id, 1, [1, 2, 3, 4]))
    pause_s = time.monotonic() - stopped_at
    assert result["metrics"]["loss:sum"] > 0
    assert 2 <= pause_s < 20
    assert gateway.engine_pids() != [engine]
    assert f"process {engine} is killed: it has given no sign of life for 2 s" in gateway.log.read_text()
    assert outcome(http, send_step(http, run_id, 2))["metrics"]


def test_a_call_that_hangs_twice_fails_and_its_run_and_others_go_on(
    gateway: ServedGateway, http: httpx.Client
) -> None:
    begun = starts(http)
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        beside = service.create_lora_training_client("fake/model", rank=4, seed=2).result()
        run_id = begin_run(http)
        first = send_pass(http, run_id, 1, [1, 2, 3, 4])
        hanging = send_pass(http, run_id, 2, [STUCK] * 4)
        afterwards = send_pass(http, run_id, 3, [1, 2, 3, 4])
        passes = [beside.forward_backward([datum(seed)], "cross_entropy") for seed in range(10)]
        failure = outcome(http, hanging)
        assert failure["category"] == "server"
        assert failure["error"].startswith(
            "the engine died 2 times while it performed this operation (error "
        )
        error_id = failure["error"].rpartition(" ")[2].rstrip(")")
        log = gateway.log.read_text()
        assert f"error {error_id}: {hanging.json()['request_id']} failed" in log
        assert log.count("its call has made no progress for 1.5 s; starting it again") == 2
        losses = [outcome(http, response)["metrics"]["loss:sum"] for response in (first, afterwards)]
        assert losses[0] == losses[1]  # the one between them had no effect, and nothing was stepped
        assert all(future.result().metrics["loss:sum"] > 0 for future in passes)
    assert starts(http) == begun + 2


def test_a_sample_that_hangs_twice_fails_alone(gateway: ServedGateway) -> None:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model="fake/model").result()
        params = tinker.SamplingParams(max_tokens=4, seed=1, stop=[])
        harmless = [
            sampler.sample(tinker.ModelInput.from_ints([1, 2]), num_samples=1, sampling_params=params)
            for _ in range(3)
        ]
        hanging = sampler.sample(tinker.ModelInput.from_ints([STUCK]), num_samples=1, sampling_params=params)
        with pytest.raises(tinker.RequestFailedError, match="the engine died 2 times"):
            hanging.result()
        assert all(len(future.result().sequences[0].tokens) == 4 for future in harmless)


def starts(http: httpx.Client) -> int:
    [engine] = http.get("/admin/v1/engines").json()["items"]
    return int(engine["starts"])


# ---------------------------------------------------------------------------- an engine that does not start


def write_python(path: Path, condition: str) -> None:
    """An interpreter that ends at once unless the condition of a shell holds."""
    path.write_text(f'#!/bin/sh\nif {condition}; then exec {sys.executable} "$@"; fi\nexit 9\n')
    path.chmod(0o755)


def test_an_engine_that_fails_to_start_again_and_again_says_so_and_takes_no_new_work(tmp_path: Path) -> None:
    python, broken = tmp_path / "python", tmp_path / "broken"
    write_python(python, f"test ! -e {broken}")
    engine = {**FAKE_ENGINE, "python": str(python)}
    gateway = ServedGateway(tmp_path / "data", [engine], engine_restart_delay_s="0.1", hold_s="0.5")
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=20) as http:
            run_id = begin_run(http)
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            broken.touch()
            os.kill(gateway.engine_pids()[0], signal.SIGKILL)
            waiting = send_pass(http, run_id, 1, [1, 2, 3, 4])
            told = told_about(http, waiting, "failing")
            assert (
                "starts in a row have failed, the last one because engine fake is gone: its process ended"
                in told
            )
            assert "exit status 9" in told
            create = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model"}
            create["lora_config"] = {"rank": 4, "seed": 1}
            refused = http.post("/api/v1/create_model", json=create)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert "starts in a row have failed" in refused.json()["detail"]
            assert send_step(http, run_id, 2).status_code == 200  # of a run that is under way
            broken.unlink()
            assert outcome(http, waiting)["metrics"]["loss:sum"] > 0
            assert http.post("/api/v1/create_model", json=create).status_code == 200
        assert gateway.stop() == 0
    finally:
        gateway.close()


def told_about(http: httpx.Client, promise: httpx.Response, state: str) -> str:
    """Why a future is still open, once the engine is in that state."""
    deadline = time.monotonic() + 30
    while True:
        told = http.post("/api/v1/retrieve_future", json={"request_id": promise.json()["request_id"]}).json()
        assert told["type"] == "try_again"
        assert told["queue_state"] == "paused_capacity"
        if f" is {state} " in told["queue_state_reason"]:
            return str(told["queue_state_reason"])
        assert time.monotonic() < deadline, told
