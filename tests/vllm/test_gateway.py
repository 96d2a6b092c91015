"""A gateway whose model Transformers trains and vLLM samples, as its clients meet it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.engines.owner import ROOT
from tests.gateway.conftest import KEY, outcome
from tests.served import ServedGateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

MODEL = "tandem/tiny"
START_S = 300.0
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def gateway(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    engines = [
        {"name": "trainer", "base_model": MODEL, "options": {"dtype": "float32"}},
        {
            "name": "sampler",
            "plugin": "vllm",
            "base_model": MODEL,
            "python": vllm_python,
            "roles": ["sample"],
            "options": {"dtype": "float32", "max_context": 512},
        },
    ]
    # Several readers of a slow disk share two cores: what loads is given time, what dies is noticed soon all the same.
    served = ServedGateway(
        tmp_path_factory.mktemp("gateway"), engines, engine_silence_s="60", engine_owner_timeout_s="30"
    )
    served.start(START_S)
    yield served
    served.stop()
    served.close()


@pytest.fixture
def client(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=120) as client:
        yield client


def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def ask(client: httpx.Client, seed: int, **params: Any) -> str:
    """A sample of the base model; the id of its future."""
    body = {
        "base_model": MODEL,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5 + seed, 6, 7]}]},
        "sampling_params": {"seed": seed, "max_tokens": 40, "stop": [1], **params},
        "num_samples": 2,
    }
    headers = {"X-Idempotency-Key": f"sample-{seed}-{params}"}
    request_id: str = client.post("/api/v1/asample", json=body, headers=headers).json()["request_id"]
    return request_id


def tokens(client: httpx.Client, request_id: str) -> list[list[int]]:
    result = outcome(client, request_id)
    assert result.get("type") == "sample", result
    return [sequence["tokens"] for sequence in result["sequences"]]


def future(client: httpx.Client, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/admin/v1/futures/{request_id}").json()
    return found


def engine(client: httpx.Client, name: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/admin/v1/engines/{name}").json()
    return found


def test_the_loop_of_the_cookbook_learns_with_samples_from_vllm(
    gateway: ServedGateway, client: httpx.Client
) -> None:
    command = [sys.executable, "cookbook/rl_loop.py", "--base-url", gateway.url, "--api-key", KEY]
    command += ["--no-train-unembed", "--steps", "14", "--group-size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"Mean reward ([\d.]+) → ([\d.]+)", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert float(found[2]) > float(found[1]) + 0.3
    answered: Counter[str] = Counter()
    where: dict[str, Any] = {"kind": "sample", "limit": 1000}
    while True:
        page = client.get("/admin/v1/futures", params=where).json()
        answered.update(future["engine"] for future in page["items"])
        assert all(future["status"] == "done" for future in page["items"])
        if page["next_cursor"] is None:
            break
        where["cursor"] = page["next_cursor"]
    assert answered == {"sampler": 14 * 8 + 6}


def test_its_log_probs_are_the_trainers(gateway: ServedGateway, client: httpx.Client) -> None:
    """Of the run that the loop has trained."""
    [run] = client.get("/admin/v1/runs").json()["items"]
    sampler = client.get("/admin/v1/samplers", params={"run_id": run["run_id"]}).json()["items"][0]
    answer = client.post(f"/admin/v1/samplers/{sampler['sampler_id']}/compare", json={"samples": 16})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["sampled_by"], found["trained_by"], found["tokens"]) == ("sampler", "trainer", 512)
    assert found["mean_difference"] < found["max_difference"] < 1e-4
    run = client.get(f"/admin/v1/runs/{run['run_id']}").json()
    assert run["sampler_difference"]["max_difference"] == found["max_difference"]


def test_a_killed_vllm_leaves_no_sample_unanswered(client: httpx.Client) -> None:
    """32 samples under way; the tokens are those of a life without a death."""
    before = engine(client, "sampler")
    asked = [ask(client, seed, max_tokens=200) for seed in range(32)]
    until(lambda: future(client, asked[0])["status"] != "queued")  # what the engine itself says comes late
    os.kill(before["pid"], signal.SIGKILL)
    found = [tokens(client, request_id) for request_id in asked]
    after = engine(client, "sampler")
    assert (after["starts"], after["pid"] != before["pid"]) == (before["starts"] + 1, True)
    told = [future(client, request_id) for request_id in asked]
    assert {each["engine"] for each in told} == {"sampler"}
    assert max(each["attempts"] for each in told) == 2
    again = [tokens(client, ask(client, seed, max_tokens=200, top_p=1.0)) for seed in range(32)]
    assert found == again


def test_completions_are_streamed_and_an_aborted_stream_frees_its_slot(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 400, "stream": True, "seed": 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        events = (line for line in response.iter_lines() if line.startswith("data: "))
        pieces = [json.loads(next(events).removeprefix("data: ")) for _ in range(4)]
    assert all(piece["choices"][0]["text"] is not None for piece in pieces)
    until(lambda: client.get("/admin/v1/metrics").json()["engines"]["sampler"].get("active_sequences") == 0)


def test_what_vllm_cannot_do_the_trainer_does(client: httpx.Client) -> None:
    body = {
        "base_model": MODEL,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"seed": 1, "max_tokens": 2},
        "num_samples": 1,
        "prompt_alt_tokens_k": 2,
    }
    request_id = client.post("/api/v1/asample", json=body).json()["request_id"]
    assert outcome(client, request_id).get("type") == "sample"
    assert client.get(f"/admin/v1/futures/{request_id}").json()["engine"] == "trainer"
