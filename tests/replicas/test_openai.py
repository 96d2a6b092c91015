"""OpenAI requests while engines die: they are answered all the same, with the tokens of a life without a death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker

from tests.gateway.test_accounts import totals, window
from tests.replicas.conftest import (
    KEY,
    MODEL,
    client_of,
    drawn,
    engines,
    prompt,
    sampler,
    send,
    states,
    until,
    until_ready,
)
from tests.served import ServedGateway
from tests.threads import beside

TOKENS = 30
DEADLY = 222
WAIT_S = 90.0


def answer(url: str, number: int, *, stream: bool) -> list[list[int]]:
    """The tokens of both choices. The client repeats nothing by itself."""
    asked: Any = {
        "model": MODEL,
        "prompt": prompt(number),
        "seed": number,
        "n": 2,
        "max_tokens": TOKENS,
        "stream": stream,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }
    choices: list[list[int]] = [[], []]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_S) as client:
        answered = client.completions.create(**asked)
        for piece in answered if stream else [answered]:
            for choice in piece.choices:
                choices[choice.index] += choice.token_ids
    return choices


def all_answers(url: str, before: Any = lambda: None) -> list[list[list[int]]]:
    """Of twenty requests at once, every second one a stream; `before` happens while they are drawn."""
    waiting = [beside(answer, url, number, stream=number % 2 == 0) for number in range(20)]
    before()
    return [each.result(WAIT_S) for each in waiting]


def kill(client: httpx.Client, name: str) -> None:
    """Kill an engine that is drawing."""
    until(lambda: engines(client)[name]["open_samples"] >= 5, "it has work")
    os.kill(engines(client)[name]["pid"], signal.SIGKILL)


def counted(client: httpx.Client) -> int:
    """The tokens that have been sampled, as billing has them."""
    starting_on, ending_before = window()
    when = {"starting_on": starting_on, "ending_before": ending_before}
    answered = client.get("/api/v1/billing/usage/events", params=when).json()
    return totals(tinker.types.BillingUsageResponse.model_validate(answered), None)["sampling_sample"]


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServedGateway]:
    replicas, settings = request.param
    made = ServedGateway(tmp_path, [sampler(replicas, delay_s=0.02)], **settings)
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize("served", [(2, {"engine_restart_delay_s": "60"})], indirect=True)
def test_what_a_dead_replica_was_drawing_another_one_draws(served: ServedGateway) -> None:
    with client_of(served.url) as client:
        until_ready(client, "sampler", "sampler-2")
        found = all_answers(served.url, lambda: kill(client, "sampler-2"))
        assert states(client) == {"sampler": "ready", "sampler-2": "down"}
        assert {len(tokens) for choices in found for tokens in choices} == {TOKENS}
        assert all_answers(served.url) == found


@pytest.mark.parametrize("served", [(1, {})], indirect=True)
def test_a_lone_engine_is_waited_for(served: ServedGateway) -> None:
    with client_of(served.url) as client:
        expected = all_answers(served.url)
        assert all_answers(served.url, lambda: kill(client, "sampler")) == expected
        # It is killed again, and who comes while it is away waits too.
        os.kill(engines(client)["sampler"]["pid"], signal.SIGKILL)
        until(lambda: states(client) != {"sampler": "ready"}, "it is away")
        assert answer(served.url, 3, stream=False) == expected[3]
        # What has been drawn twice counts once.
        until(lambda: counted(client) >= 41 * 2 * TOKENS, "all is counted")
        assert counted(client) == 41 * 2 * TOKENS


@pytest.mark.slow
def test_what_kills_engines_fails_and_its_neighbours_do_not(tmp_path: Path) -> None:
    engine = sampler(2, delay_s=0.01, crash_on_token=DEADLY)
    served = ServedGateway(tmp_path, [engine], engine_restart_delay_s="0.1")
    served.start()
    try:
        with client_of(served.url) as client:
            expected = all_answers(served.url)
            stored = [send(client, prompt(number), seed=number) for number in range(20)]
            waiting = [beside(answer, served.url, number, stream=number % 2 == 0) for number in range(20)]
            body = {"model": MODEL, "prompt": [65, DEADLY], "max_tokens": 4}
            failed = client.post("/v1/completions", json=body)
            assert failed.status_code == 422, failed.text  # which no client repeats
            assert failed.json()["error"]["code"] == "engine_died"
            assert "the engine died" in failed.json()["error"]["message"]
            assert [each.result(WAIT_S) for each in waiting] == expected
            for request_id in stored:
                drawn(client, request_id)
    finally:
        served.close()
