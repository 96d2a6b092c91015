"""A client that asks for more than there is room for, and one that waits: what each is told, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import tinker

from benchmarks import pressure
from benchmarks.measuring import processor_seconds, resident_bytes, threads_of
from gateway.tinker.results import PROTOBUF
from tests.gateway.conftest import KEY, begin_run, datum, outcome, send_pass, send_step
from tests.served import ServedGateway

SLOW = {"name": "slow", "plugin": "fake", "base_model": "fake/model", "options": {"delay_s": 0.05}}
DOWN = {"name": "down", "plugin": "fake", "base_model": "down/model", "python": "/bin/false"}
SETTINGS: dict[str, Any] = {
    "hold_s": "1",
    "gap_timeout_s": "60",
    "samples_in_engine": "1",
    "max_queued_per_run": "5",
    "announced_result_bytes": "2000",
    "engine_restart_delay_s": "60",
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """One engine that works slowly, and one that never starts."""
    served = ServedGateway(tmp_path_factory.mktemp("pressed"), [SLOW, DOWN], **SETTINGS)
    with pytest.raises(RuntimeError, match="not ready"):
        served.start(timeout_s=6)
    yield served
    served.close()


@pytest.fixture
def http(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def begin_sampler(http: httpx.Client, base_model: str = "fake/model") -> str:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": base_model}
    return str(http.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"])


def send_sample(http: httpx.Client, sampler: str, seq_id: int, **params: Any) -> httpx.Response:
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 60, "stop": [], "seed": 1, **params},
    }
    return http.post("/api/v1/asample", json=body)


def peek(http: httpx.Client, request_id: str, **more: Any) -> dict[str, Any]:
    """One answer of retrieve_future."""
    answer: dict[str, Any] = http.post(
        "/api/v1/retrieve_future", json={"request_id": request_id, **more}
    ).json()
    return answer


def test_each_future_is_told_of_its_own_engine(http: httpx.Client) -> None:
    here = send_step(http, begin_run(http), 2).json()["request_id"]
    there = send_sample(http, begin_sampler(http, "down/model"), 1).json()["request_id"]
    told = peek(http, here)
    assert (told["type"], told["queue_state"]) == ("try_again", "active")
    assert told["queue_state_reason"] == "operation 1 of its run has not arrived"
    told = peek(http, there)
    assert told["queue_state"] == "paused_capacity"
    assert told["queue_state_reason"].startswith("the engine of down/model is down (")
    assert "exit status 1" in told["queue_state_reason"]


def test_a_sample_that_waits_for_room_is_told_its_place(http: httpx.Client) -> None:
    sampler = begin_sampler(http)
    promised = [send_sample(http, sampler, seq_id).json()["request_id"] for seq_id in range(3)]
    told = peek(http, promised[2])
    assert told["queue_state"] == "paused_capacity"
    assert told["queue_state_reason"].startswith("1 samples of yours come before it; the engine draws 1")
    assert peek(http, promised[0]).get("queue_state_reason", "it is being drawn") == "it is being drawn"
    for request_id in promised:
        assert len(outcome(http, request_id)["sequences"][0]["tokens"]) == 60


def test_the_chunk_that_comes_last_gets_through_a_full_queue(http: httpx.Client) -> None:
    run_id = begin_run(http)
    assert [send_step(http, run_id, seq_id).status_code for seq_id in range(2, 7)] == [200] * 5
    refused = send_step(http, run_id, 7)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "max_queued_per_run" in refused.json()["detail"]
    assert send_step(http, run_id, 4).json()["request_id"] == f"{run_id}:4"  # known already
    assert send_pass(http, run_id, 1, [3, 1, 4, 1, 5]).status_code == 200
    assert "metrics" in outcome(http, f"{run_id}:6")
    assert send_step(http, run_id, 7).status_code == 200
    assert "metrics" in outcome(http, f"{run_id}:7")


def test_a_large_result_is_announced_to_who_asks_for_that(http: httpx.Client) -> None:
    run_id = begin_run(http)
    large = send_pass(http, run_id, 1, [n % 250 for n in range(1200)]).json()["request_id"]
    small = send_pass(http, run_id, 2, [3, 1, 4]).json()["request_id"]
    outcome(http, small)
    body = {"request_id": large}
    for accept in (PROTOBUF, "application/json"):
        headers = {"accept": accept}
        peeked = http.post(
            "/api/v1/retrieve_future", json={**body, "allow_metadata_only": True}, headers=headers
        )
        whole = http.post(
            "/api/v1/retrieve_future", json={**body, "allow_metadata_only": False}, headers=headers
        )
        assert peeked.json() == {"status": "complete_metadata", "response_payload_size": len(whole.content)}
        assert len(whole.content) > 2000
    assert "metrics" in peek(http, large)
    assert "metrics" in peek(http, small, allow_metadata_only=True)


def test_the_official_client_fetches_what_was_announced(gateway: ServedGateway) -> None:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4).result()
        result = client.forward([datum(1, 1200)], "cross_entropy").result()
    [output] = result.loss_fn_outputs
    assert len(output["logprobs"].data) == 1200


PARKED = 2000


def test_parked_requests_cost_no_thread_and_little_memory(tmp_path: Path) -> None:
    served = ServedGateway(tmp_path / "parked", [SLOW], **{**SETTINGS, "hold_s": "30"})
    served.start()
    try:
        asyncio.run(park(served))
    finally:
        served.close()


async def park(served: ServedGateway) -> None:
    """2,000 requests that wait for one result."""
    with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        request_id = send_step(http, begin_run(http), 2).json()["request_id"]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(served.url, headers={"X-API-Key": KEY}, connector=connector) as client:
        memory, threads = resident_bytes(served.pid), threads_of(served.pid)

        async def wait() -> int:
            async with client.post("/api/v1/retrieve_future", json={"request_id": request_id}) as answer:
                return int(answer.status)

        waiting = [asyncio.create_task(wait()) for _ in range(PARKED)]
        await asyncio.sleep(4)
        spent = processor_seconds(served.pid)
        await asyncio.sleep(5)
        assert not any(task.done() for task in waiting)
        assert processor_seconds(served.pid) - spent < 1.0  # a busy machine takes twice what a calm one takes
        assert resident_bytes(served.pid) - memory < 100e6
        assert threads_of(served.pid) - threads <= 4
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.slow
def test_two_thousand_samples_are_answered_and_others_hardly_notice(tmp_path: Path) -> None:
    """The smallest round trip is compared: it is what the machine's other work disturbs least."""
    results = pressure.measure(tmp_path, pressure.SAMPLES, 30)
    for kind in ("raw", "sdk"):
        found = results[kind]
        assert found["answered"] == pressure.SAMPLES
        assert found["grown_mb"] < 100
        assert found["threads"] - found["threads_before"] <= 4
        assert found["other"]["smallest_ms"] < 3 * results["idle"]["smallest_ms"]
