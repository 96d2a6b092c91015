"""A gateway whose engine another one has does everything that one does, by the official SDK and plain HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.gateway.conftest import begin_run, datum, outcome, send_pass, send_step
from tests.gateway.test_completions import LONG, SLOW, begin_sampler, cancel, poll, running, send_sample
from tests.gateways.conftest import KEY, Pair, database, rows
from tests.postgres import PostgresServer

pytestmark = [
    pytest.mark.postgres,
    # The SDK warns of its own deprecations, and leaves connections of its background loops to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
ADAM = tinker.AdamParams(learning_rate=0.01)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


def everything(url: str) -> dict[str, Any]:
    """A little of all that a client does, and the numbers of it."""
    found: dict[str, Any] = {}
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        found["arch"] = client.get_info().model_data.arch
        passes, steps = [], []
        for step in range(5):
            passes.append(client.forward_backward([datum(step)], "cross_entropy"))
            steps.append(client.optim_step(ADAM))
        found["losses"] = [future.result().metrics["loss:sum"] for future in passes]
        assert all(future.result() for future in steps)
        saved = client.save_weights_for_sampler("end").result()
        sampler = service.create_sampling_client(model_path=saved.path).result()
        params = tinker.SamplingParams(max_tokens=5, seed=1)
        drawn = [sampler.sample(PROMPT, num_samples=2, sampling_params=params) for _ in range(3)]
        found["drawn"] = [[list(each.tokens) for each in future.result().sequences] for future in drawn]
        resumed = service.create_training_client_from_state(client.save_state("state").result().path).result()
        found["resumed"] = resumed.forward([datum(9)], "cross_entropy").result().metrics["loss:sum"]
    return found


def test_everything_gives_the_same_numbers_at_both(pair: Pair) -> None:
    expected = everything(pair.holder.url)
    assert everything(pair.other.url) == expected
    [(epochs, most)] = rows(pair.url, "select count(distinct epoch), max(attempts) from futures")
    assert (epochs, most) == (1, 1)  # nothing was tried twice, nothing ran anywhere else


def test_a_round_trip_at_the_other_gateway_needs_no_polling(at_other: httpx.Client) -> None:
    """Looks come every three seconds: without notices, twelve operations one after the other would take as many."""
    run = begin_run(at_other)
    began = time.monotonic()
    for number in range(1, 13):
        promise = send_pass(at_other, run, number, [1, 2, 3, 4]).json()
        assert outcome(at_other, promise["request_id"])["metrics"]["loss:sum"] > 0
    assert time.monotonic() - began < 3


def test_a_run_may_change_gateways_with_each_call(at_other: httpx.Client, at_holder: httpx.Client) -> None:
    run = begin_run(at_other)
    sides = [at_other, at_holder]
    promises = [
        send_pass(sides[number % 2], run, number, [number, 2, 3, 4]).json()["request_id"]
        for number in (2, 4, 1, 3, 5, 6)  # out of order too
    ]
    with ThreadPoolExecutor(len(promises)) as pool:
        futures = [pool.submit(outcome, sides[place % 2], each) for place, each in enumerate(promises)]
        there = [future.result()["metrics"]["loss:sum"] for future in futures]
    assert [outcome(at_other, each)["metrics"]["loss:sum"] for each in promises] == there
    assert [outcome(at_holder, each)["metrics"]["loss:sum"] for each in promises] == there


def test_a_queue_of_completions_may_be_polled_at_both_with_one_cursor(
    at_other: httpx.Client, at_holder: httpx.Client
) -> None:
    sampler = begin_sampler(at_other)
    sides = [at_holder, at_other]
    told: set[str] = set()
    cursor, sent = 0, set()
    for turn in range(8):
        sent.add(send_sample(sides[turn % 2], sampler, turn))
        sent.add(send_sample(sides[turn % 2], sampler, 100 + turn))
        answer = poll(sides[(turn // 2) % 2], sampler, cursor)
        told |= {each["request_id"] for each in answer["completions"]}
        assert answer["cursor"] >= cursor
        cursor = answer["cursor"]
    for _ in range(20):
        if told == sent:
            break
        answer = poll(sides[_ % 2], sampler, cursor, timeout=1)
        told |= {each["request_id"] for each in answer["completions"]}
        cursor = answer["cursor"]
    assert told == sent


def test_a_poll_at_the_other_gateway_is_woken(at_other: httpx.Client, at_holder: httpx.Client) -> None:
    sampler = begin_sampler(at_other)
    assert poll(at_other, sampler, 0, timeout=0.1)["completions"] == []  # from now on its queue is kept there
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, at_other, sampler, 0)
        time.sleep(0.3)
        began = time.monotonic()
        sample = send_sample(at_holder, sampler, 0)
        assert [each["request_id"] for each in waiting.result()["completions"]] == [sample]
        assert time.monotonic() - began < 2


def test_what_ends_at_one_gateway_is_over_at_the_other_at_once(
    at_other: httpx.Client, at_holder: httpx.Client
) -> None:
    run = begin_run(at_holder)
    sides = [at_other, at_holder]
    for side in sides:
        assert side.post("/api/v1/get_info", json={"model_id": run}).status_code == 200
    assert send_step(at_other, run, 1).status_code == 200
    at_other.post("/api/v1/unload_model", json={"model_id": run})
    assert [send_step(side, run, 2).status_code for side in sides] == [410, 410]
    session = run.partition(":")[0]
    beat = {"session_id": session}
    assert [side.post("/api/v1/session_heartbeat", json=beat).status_code for side in sides] == [200, 200]
    at_holder.post(f"/api/v1/sessions/{session}/finish", json={})
    assert [side.post("/api/v1/session_heartbeat", json=beat).status_code for side in sides] == [410, 410]


def test_a_stranger_finds_nothing_by_asking_the_other_gateway(at_other: httpx.Client) -> None:
    for call, body in (
        ("retrieve_future", {"request_id": "s:train:0:1"}),
        ("cancel_future", {"request_id": "s:train:0:1"}),
        ("get_info", {"model_id": "s:train:0"}),
    ):
        assert at_other.post(f"/api/v1/{call}", json=body).status_code == 404


def test_the_tokenizer_and_the_lists_are_the_same(at_other: httpx.Client, at_holder: httpx.Client) -> None:
    begin_run(at_holder)
    for path in (
        "/api/v1/get_server_capabilities",
        "/api/v1/tokenizer?model=fake/model",
        "/api/v1/training_runs?limit=100",
        "/api/v1/sessions?limit=100",
        "/v1/models",
    ):
        here, there = at_other.get(path), at_holder.get(path)
        assert here.status_code == 200, path
        if path != "/v1/models":  # which tells since when each process serves
            assert here.json() == there.json(), path


@pytest.fixture
def narrow_pair(pg_server: PostgresServer, _pg_template: str, tmp_path: Path) -> Iterator[Pair]:
    """A slow engine that has one sample at a time, and short queues."""
    limits = {"samples_in_engine": "1", "max_queued_samples": "4", "max_queued_per_run": "4"}
    pair = Pair(tmp_path, database(pg_server, _pg_template), [SLOW], **limits)
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


def test_samples_are_given_up_and_queues_are_full_at_the_other_gateway_too(narrow_pair: Pair) -> None:
    with httpx.Client(base_url=narrow_pair.other.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        sampler = begin_sampler(http)
        promises = [send_sample(http, sampler, seq_id, LONG) for seq_id in range(2)]
        last = send_sample(http, sampler, 2)
        running(http, promises[0])
        time.sleep(1.1)  # what waits is counted once a second
        full = {
            "sampling_session_id": sampler,
            "prompt": {"chunks": [{"tokens": [1]}]},
            "sampling_params": {},
        }
        answers = [http.post("/api/v1/asample", json={**full, "seq_id": number}) for number in (7, 8)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert answers[1].headers["retry-after"] == "1"
        assert all(cancel(http, each) for each in promises)  # the one under way and the one that waits
        gone = {"error": "the sample was cancelled by its client", "category": "user"}
        assert [outcome(http, each) for each in promises] == [gone, gone]
        began = time.monotonic()
        assert outcome(http, last)["type"] == "sample"  # its place is free: the long ones would take minutes
        assert time.monotonic() - began < 10
        run = begin_run(http)
        time.sleep(1.1)
        sent = [send_step(http, run, number).status_code for number in (9, 8, 7, 6)]  # number 1 does not come
        assert sent == [200] * 4
        assert send_step(http, run, 10).status_code == 429
        assert send_step(http, run, 5).status_code == 200  # what others wait for is taken all the same
