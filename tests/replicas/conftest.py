"""A gateway with replicas of the numpy engine, and many samples at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from engines.fake.engine import FakeEngine
from engines.interface import EngineConfig, SampleEnd
from engines.operations import SampleRequest, SampleResult
from engines.tensors import Tensor

KEY = "tml-test"
MODEL = "fake/model"
MAX_TOKENS = 12
WAIT_S = 60.0


def sampler(replicas: object, **options: Any) -> dict[str, Any]:
    """An engine of the settings."""
    return {
        "name": "sampler",
        "plugin": "fake",
        "base_model": MODEL,
        "roles": ["sample"],
        "replicas": replicas,
        "options": options,
    }


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"X-API-Key": KEY}, timeout=60)


def prompt(number: int) -> list[int]:
    return [65 + number % 20, 3 + number % 7, 40 + number // 20 % 50]


def send(client: httpx.Client, tokens: list[int], seed: int, **more: Any) -> str:
    """Ask for a sample of the base model; its id."""
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "sampling_params": {"max_tokens": MAX_TOKENS, "seed": seed},
        "num_samples": 1,
        "base_model": MODEL,
        **more,
    }
    answer = client.post("/api/v1/asample", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def drawn(client: httpx.Client, request_id: str) -> list[int]:
    """The tokens of a sample, once it has been drawn."""
    deadline = time.monotonic() + WAIT_S
    while True:
        body = client.post("/api/v1/retrieve_future", json={"request_id": request_id}).json()
        if body.get("type") != "try_again":
            assert body.get("type") == "sample", body
            return list(body["sequences"][0]["tokens"])
        assert time.monotonic() < deadline, f"{request_id} is not answered"


def future(client: httpx.Client, request_id: str) -> dict[str, Any]:
    """What the admin API says of a call."""
    found: dict[str, Any] = client.get(f"/admin/v1/futures/{request_id}").json()
    return found


def engines(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {engine["name"]: engine for engine in client.get("/admin/v1/engines").json()["items"]}


def states(client: httpx.Client) -> dict[str, str]:
    return {name: engine["state"] for name, engine in engines(client).items()}


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for something; it ends as soon as it is so."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {WAIT_S:.0f} s: {what}"
        time.sleep(0.05)


def until_ready(client: httpx.Client, *names: str) -> None:
    """Until these engines are there, ready, and no others."""
    until(lambda: states(client) == dict.fromkeys(names, "ready"), f"{names} are ready: {states(client)}")


def alone(tokens: list[int], seed: int, storage: str) -> list[int]:
    """What the engine draws that nobody else uses and no gateway stands before."""
    config = EngineConfig(
        name="alone",
        plugin="fake",
        base_model=MODEL,
        model=MODEL,
        roles=("sample",),
        storage=storage,
        epoch=1,
        options={},
        owner_timeout_s=9.0,
    )
    engine = FakeEngine.load(config)
    request = SampleRequest(
        Tensor.of(np.array(tokens, dtype=np.int32)), num_samples=1, seed=seed, max_tokens=MAX_TOKENS
    )
    engine.start_sample(1, request)
    while True:
        for event in engine.advance():
            if isinstance(event, SampleEnd):
                assert isinstance(event.result, SampleResult)
                return [int(token) for token in event.result.sequences[0].tokens.array()]
