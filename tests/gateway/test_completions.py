"""Finished samples told in one waiting request, numbers for further clients, and samples that are given up."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.gateway.test_keys import client_with, make_key
from tests.postgres import PostgresServer
from tests.served import FAKE_ENGINE, ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
BLOCK = 10**9
LONG = 6000
"""Tokens of a sample that would take the slow engine minutes."""
SLOW = {**FAKE_ENGINE, "options": {"delay_s": 0.02}}


def begin_sampler(http: httpx.Client) -> str:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    return str(http.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"])


def send_sample(http: httpx.Client, sampler: str, seq_id: int, max_tokens: int = 3, **changes: Any) -> str:
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": max_tokens, "stop": []},
        **changes,
    }
    return str(http.post("/api/v1/asample", json=body).json()["request_id"])


def poll(http: httpx.Client, sampler: str, cursor: int, client: int = 0, **more: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": client}
    answer = http.post("/api/v1/retrieve_futures", json={"target": target, "prev_cursor": cursor, **more})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


# ---------------------------------------------------------------------------- told in one request


def test_finished_samples_are_told_once_with_their_fate(http: httpx.Client) -> None:
    sampler = begin_sampler(http)
    assert poll(http, sampler, 0, timeout=0) == {"completions": [], "cursor": 0}
    good = [send_sample(http, sampler, seq_id) for seq_id in range(5)]
    bad = send_sample(http, sampler, 5, sampling_params={"max_tokens": 3, "temperature": -1})
    unread = send_sample(http, sampler, 6, no_such_field=1)
    send_sample(http, sampler, BLOCK)
    told: dict[str, str] = {}
    cursor = 0
    while len(told) < 7:
        page = poll(http, sampler, cursor)
        assert page["completions"]
        assert page["cursor"] > cursor
        cursor = page["cursor"]
        told |= {each["request_id"]: each["state"] for each in page["completions"]}
    assert told == {**dict.fromkeys(good, "finished"), bad: "failed", unread: "failed"}
    assert outcome(http, good[0])["type"] == "sample"
    assert outcome(http, bad)["category"] == "user"
    assert poll(http, sampler, cursor, timeout=0) == {"completions": [], "cursor": cursor}
    [other] = poll(http, sampler, 0, client=1)["completions"]
    assert other["request_id"].endswith(f":{BLOCK}")


def test_a_poll_waits_for_the_first_and_is_not_answered_empty_at_once(http: httpx.Client) -> None:
    sampler = begin_sampler(http)
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        waiting = pool.submit(poll, http, sampler, 0)
        time.sleep(2.5)
        assert not waiting.done()
        request_id = send_sample(http, sampler, 0)
        assert [each["request_id"] for each in waiting.result(10)["completions"]] == [request_id]
    assert time.monotonic() - started < 10
    started = time.monotonic()
    assert poll(http, sampler, 0, timeout=0, retrieved_request_ids=[request_id])["completions"] == []
    assert time.monotonic() - started < 1


def test_each_further_client_gets_a_number_of_its_own(http: httpx.Client) -> None:
    sampler = begin_sampler(http)
    for expected in (1, 2):
        answer = http.post("/api/v1/join_sampling_session", json={"sampling_session_id": sampler})
        assert answer.json() == {"type": "join_sampling_session", "client_counter": expected}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/retrieve_futures", {"target": {"sampling_session_id": "no:sample:0"}}),
        ("/api/v1/join_sampling_session", {"sampling_session_id": "no:sample:0"}),
        ("/api/v1/cancel_future", {"request_id": "no:sample:0:0"}),
    ],
)
def test_what_is_not_there_is_not_found(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 404
    assert "no:sample:0" in answer.json()["detail"]


def test_somebody_elses_are_not_found(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "keys", [SLOW])
    ann, bob = make_key(gateway, "ann"), make_key(gateway, "bob")
    gateway.start()
    try:
        with client_with(gateway, ann) as mine, client_with(gateway, bob) as other:
            sampler = begin_sampler(mine)
            request_id = send_sample(mine, sampler, 0, LONG)
            for path, body in (
                ("retrieve_futures", {"target": {"sampling_session_id": sampler}}),
                ("join_sampling_session", {"sampling_session_id": sampler}),
                ("cancel_future", {"request_id": request_id}),
            ):
                assert other.post(f"/api/v1/{path}", json=body).status_code == 404
            still = mine.get(f"/admin/v1/futures/{request_id}").json()["status"]
            assert still in ("queued", "running")
    finally:
        gateway.stop()
        gateway.close()


# ---------------------------------------------------------------------------- given up


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServedGateway]:
    """A slow engine that has one sample at a time."""
    settings = {"samples_in_engine": "1", "lease_s": "4", "engine_owner_timeout_s": "2.5"}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        settings["database_url"] = server.url(
            server.create_database(template=request.getfixturevalue("_pg_template"))
        )
    gateway = ServedGateway(tmp_path / "narrow", [SLOW], **settings)
    gateway.start()
    yield gateway
    gateway.stop()
    gateway.close()


def cancel(http: httpx.Client, request_id: str) -> bool:
    answer = http.post("/api/v1/cancel_future", json={"request_id": request_id})
    assert answer.status_code == 200, answer.text
    cancelled: bool = answer.json()["cancelled"]
    return cancelled


def running(http: httpx.Client, request_id: str) -> None:
    while http.get(f"/admin/v1/futures/{request_id}").json()["status"] != "running":
        time.sleep(0.02)


def test_a_sample_that_is_given_up_frees_its_place(narrow: ServedGateway) -> None:
    with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        sampler = begin_sampler(http)
        first, second = (send_sample(http, sampler, seq_id, LONG) for seq_id in (0, 1))
        third = send_sample(http, sampler, 2)
        running(http, first)
        started = time.monotonic()
        assert cancel(http, second)  # waits
        assert cancel(http, first)  # under way
        gone = {"error": "the sample was cancelled by its client", "category": "user"}
        assert outcome(http, second) == gone
        assert outcome(http, first) == gone
        assert outcome(http, third)["type"] == "sample"
        assert time.monotonic() - started < 10
        assert [cancel(http, each) for each in (first, second, third)] == [False] * 3
        assert outcome(http, third)["type"] == "sample"
        states = {each["request_id"]: each["state"] for each in poll(http, sampler, 0)["completions"]}
        assert states == {first: "failed", second: "failed", third: "finished"}


def test_a_runs_operations_are_never_given_up(narrow: ServedGateway) -> None:
    with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        run = begin_run(http)
        passed = send_pass(http, run, 1, [1, 2, 3, 4]).json()["request_id"]
        step = send_step(http, run, 2).json()["request_id"]
        assert not cancel(http, passed)
        assert not cancel(http, step)
        assert outcome(http, passed)["metrics"]["loss:sum"] > 0
        assert outcome(http, step)["type"] == "optim_step"


def test_what_a_killed_engine_had_can_be_given_up(narrow: ServedGateway) -> None:
    """While the engine is away the sample is in the database only."""
    with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        sampler = begin_sampler(http)
        lost = send_sample(http, sampler, 0, LONG)
        running(http, lost)
        narrow.kill()
        narrow.start()
        assert cancel(http, lost)
        assert outcome(http, lost)["category"] == "user"
        assert outcome(http, send_sample(http, sampler, 1))["type"] == "sample"


# ---------------------------------------------------------------------------- by the official SDK

PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


def draw(sampler: tinker.SamplingClient, seed: int, max_tokens: int = 8) -> Any:
    params = tinker.SamplingParams(max_tokens=max_tokens, seed=seed, stop=[])
    return sampler.sample(PROMPT, num_samples=1, sampling_params=params)


def test_hundreds_in_flight_survive_a_killed_gateway(narrow: ServedGateway) -> None:
    """Each answer is the one of its own seed, whether it was told before, during or after the restart."""
    narrow.stop()
    narrow._environment["TANDEM_SAMPLES_IN_ENGINE"] = "16"
    narrow.start()
    with tinker.ServiceClient(base_url=narrow.url, api_key=KEY) as service:
        sampler: Any = service.create_sampling_client(base_model="fake/model").result()
        first = draw(sampler, 0).result().sequences[0].tokens
        assert sampler.holder._client_config.sample_use_retrieve_futures
        futures = [draw(sampler, seed % 10) for seed in range(400)]
        while sum(future.done() for future in futures) < 40:
            time.sleep(0.05)
        narrow.kill()
        assert not all(future.done() for future in futures)
        narrow.start()
        tokens = [future.result(timeout=120).sequences[0].tokens for future in futures]
    assert tokens[0] == first
    for seed in range(10):
        assert len({tuple(each) for each in tokens[seed::10]}) == 1
    assert len({tuple(each) for each in tokens[:10]}) > 5


def test_clients_in_other_processes_do_not_meet(narrow: ServedGateway) -> None:
    with tinker.ServiceClient(base_url=narrow.url, api_key=KEY) as service:
        sampler: Any = service.create_sampling_client(base_model="fake/model").result()
        copied = pickle.dumps(sampler)  # how the SDK hands a client to another process
        clones: list[Any] = [pickle.loads(copied) for _ in range(3)]  # noqa: S301
        for seed, client in enumerate([sampler, *clones]):
            assert len(draw(client, seed).result().sequences[0].tokens) == 8
        with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}) as http:
            rows = http.get("/admin/v1/futures", params={"kind": "sample"}).json()["items"]
    assert sorted(row["seq_id"] // BLOCK for row in rows) == [0, 1, 2, 3]


def test_an_abandoned_future_stops_the_sampling(narrow: ServedGateway) -> None:
    async def abandon() -> None:
        with tinker.ServiceClient(base_url=narrow.url, api_key=KEY) as service:
            sampler = await service.create_sampling_client(base_model="fake/model")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(draw(sampler, 1, LONG), 2.0)
            answer = await asyncio.wait_for(draw(sampler, 2), 10.0)
            assert len(answer.sequences[0].tokens) == 8

    asyncio.run(abandon())
    with httpx.Client(base_url=narrow.url, headers={"X-API-Key": KEY}) as http:
        rows = http.get("/admin/v1/futures", params={"kind": "sample"}).json()["items"]
    assert {row["seq_id"]: row["status"] for row in rows} == {0: "failed", 1: "done"}
