"""Two processes of vLLM behind a gateway; one is killed in the middle of its work, and its clients notice nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import openai
import pytest

from tests.engines.owner import ROOT
from tests.gateway.conftest import KEY
from tests.official import LEAVE
from tests.replicas.conftest import client_of, engines, states, until
from tests.served import ServedGateway
from tests.threads import beside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

MODEL = "tandem/tiny"
SAMPLES = 24
TOKENS = 400
START_S = 300.0
SDK = f"""
import json, sys
import tinker
service = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
sampler = service.create_sampling_client(base_model={MODEL!r})
waiting = [
    sampler.sample(
        prompt=tinker.ModelInput.from_ints([5 + number, 6, 7]),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens={TOKENS}, seed=number, stop=[1]),
    )
    for number in range({SAMPLES})
]
print(json.dumps([each.result(timeout=240).sequences[0].tokens for each in waiting]))
{LEAVE}
"""


@pytest.fixture
def gateway(vllm_python: str, tmp_path: Any) -> Iterator[ServedGateway]:
    """Each process has memory of its own for keys and values: 1 GiB unless an option says more."""
    sampler = {
        "name": "sampler",
        "plugin": "vllm",
        "base_model": MODEL,
        "python": vllm_python,
        "roles": ["sample"],
        "replicas": 2,
        "options": {"dtype": "float32", "max_context": 512, "sample_slots": 16, "cache_gib": 1},
    }
    served = ServedGateway(tmp_path, [sampler], engine_silence_s="60", engine_owner_timeout_s="30")
    served.start(START_S)
    yield served
    served.close()


def of_the_sdk(url: str) -> list[list[int]]:
    """What the official SDK gets, in a process of its own."""
    command = [sys.executable, "-c", SDK, url, KEY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_openai(url: str, number: int, *, stream: bool) -> list[int]:
    """What OpenAI's client gets, which repeats nothing by itself."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": [5 + number, 6, 7],
        "seed": number,
        "max_tokens": TOKENS,
    }
    more: dict[str, Any] = {"extra_body": {"return_token_ids": True, "ignore_eos": True}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=240) as client:
        if not stream:
            whole: Any = client.completions.create(**asked, **more)
            return list(whole.choices[0].token_ids)
        pieces: Any = client.completions.create(**asked, **more, stream=True)
        return [token for piece in pieces for token in piece.choices[0].token_ids or []]


def asked_by_all(client: httpx.Client, url: str) -> tuple[Future[list[list[int]]], list[Future[list[int]]]]:
    """The SDK's samples and, when those are there, twelve requests of OpenAI's client, half of them streams."""
    samples = beside(of_the_sdk, url)
    until(lambda: _open(client) >= SAMPLES // 2, "the samples of the SDK have come")
    return samples, [beside(of_openai, url, number, stream=number % 2 == 1) for number in range(12)]


def test_a_replica_is_killed_under_load_and_nobody_notices(gateway: ServedGateway) -> None:
    with client_of(gateway.url) as client:
        until_both_are_ready(client)
        samples, requests = asked_by_all(client, gateway.url)
        expected = samples.result(300), [each.result(300) for each in requests]
        assert {len(tokens) for tokens in expected[1]} == {TOKENS}

        samples, requests = asked_by_all(client, gateway.url)
        until(lambda: all(each["open_samples"] > 2 for each in engines(client).values()), "both have work")
        victim = max(engines(client).values(), key=lambda each: int(each["open_samples"]))
        os.kill(victim["pid"], signal.SIGKILL)
        found = samples.result(300), [each.result(300) for each in requests]
        assert found == expected

        until(
            lambda: engines(client)[victim["name"]]["starts"] == victim["starts"] + 1, "it is started again"
        )
        until_both_are_ready(client)
        futures = client.get("/admin/v1/futures", params={"kind": "sample", "limit": 1000}).json()["items"]
        assert {each["status"] for each in futures} == {"done"}
        assert {each["engine"] for each in futures} == {"sampler", "sampler-2"}
        assert max(each["attempts"] for each in futures) == 2  # so it was drawing when it died


def until_both_are_ready(client: httpx.Client) -> None:
    """Loading takes half a minute, or minutes on a busy machine."""
    deadline = time.monotonic() + START_S
    while states(client) != {"sampler": "ready", "sampler-2": "ready"}:
        assert time.monotonic() < deadline, states(client)
        time.sleep(0.2)


def _open(client: httpx.Client) -> int:
    return sum(each["open_samples"] for each in engines(client).values())
