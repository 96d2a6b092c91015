"""OpenAI requests at a gateway whose engine another one has: passed on there with the client's own key, or refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.conftest import begin_run, outcome
from tests.gateways.conftest import KEY, Pair, database, rows
from tests.postgres import PostgresServer
from tests.served import FAKE_ENGINE

pytestmark = pytest.mark.postgres
MODEL = "fake/model"


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def chatted(client: openai.OpenAI, *, stream: bool, **more: Any) -> tuple[str, int]:
    """A reply's text, and how many pieces it came in."""
    messages: Any = [{"role": "user", "content": "hello"}]
    if not stream:
        whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, seed=1, **more)
        return whole.choices[0].message.content or "", 1
    chunks = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, seed=1, stream=True, **more
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    return "".join(texts), len([text for text in texts if text])


def test_both_gateways_answer_alike(pair: Pair) -> None:
    with client_of(pair.holder.url) as here, client_of(pair.other.url) as there:
        completion: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 6, "seed": 3}
        expected = [choice.text for choice in here.completions.create(**completion).choices]
        assert [choice.text for choice in there.completions.create(**completion).choices] == expected
        assert chatted(there, stream=False) == chatted(here, stream=False)
        text, pieces = chatted(there, stream=True)
        assert (text, pieces) == chatted(here, stream=True)
        assert pieces > 1
        for bad in ({"logit_bias": {"-5": 1}}, {"temperature": 9000}):
            with pytest.raises(openai.BadRequestError) as first:
                chatted(here, stream=False, **bad)
            with pytest.raises(openai.BadRequestError) as second:
                chatted(there, stream=False, **bad)
            assert first.value.body == second.value.body
        [served] = there.models.list().data
        assert served.model_dump()["ready"] is True


def test_a_checkpoint_is_sampled_by_its_path_at_both(pair: Pair, at_other: httpx.Client) -> None:
    run = begin_run(at_other)
    save = {"model_id": run, "seq_id": 1, "path": "w"}
    promise = at_other.post("/api/v1/save_weights_for_sampler", json=save).json()
    path = outcome(at_other, promise["request_id"])["path"]
    with client_of(pair.other.url) as there:
        assert there.models.retrieve(path).id == path
        assert there.completions.create(model=path, prompt="a", max_tokens=3).choices[0].text


def test_a_request_is_passed_on_once(pair: Pair) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    marked = {"X-API-Key": KEY, "X-Tandem-Passed-On": "1"}
    url = "/v1/completions"
    assert httpx.post(f"{pair.holder.url}{url}", json=body, headers=marked).status_code == 200
    refused = httpx.post(f"{pair.other.url}{url}", json=body, headers=marked)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert refused.headers["retry-after"] == "1"


@pytest.fixture
def slow_pair(pg_server: PostgresServer, _pg_template: str, tmp_path: Path) -> Iterator[Pair]:
    engine = {**FAKE_ENGINE, "options": {"delay_s": 0.05}}
    pair = Pair(tmp_path, database(pg_server, _pg_template), [engine])
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


def active_samples(pair: Pair) -> float:
    metrics = httpx.get(f"{pair.holder.url}/admin/v1/metrics", timeout=10).json()
    count: float = metrics["engines"]["fake"]["active_samples"]
    return count


def test_a_stream_that_is_left_or_cut_ends_at_both(slow_pair: Pair) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 4000, "stream": True}
    url = f"{slow_pair.other.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers={"X-API-Key": KEY}, timeout=30) as answer:
        events = answer.iter_lines()
        assert next(events).startswith("data: ")
    deadline = time.monotonic() + 10  # the engine tells its counts now and then
    while active_samples(slow_pair):
        assert time.monotonic() < deadline, "the engine still samples for a client that has left"
        time.sleep(0.1)
    with httpx.stream("POST", url, json=body, headers={"X-API-Key": KEY}, timeout=30) as answer:
        events = answer.iter_lines()
        assert next(events).startswith("data: ")
        threading.Timer(0.3, slow_pair.holder.kill).start()
        last = [line for line in events if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_lost"
    refused = httpx.post(url, json=body, headers={"X-API-Key": KEY}, timeout=30)  # its lease still runs
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")


def test_keys_count_at_the_gateway_that_answers_and_without_an_address_it_is_said(
    pg_server: PostgresServer, _pg_template: str, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, database(pg_server, _pg_template))
    pair.holder.set("internal_url", "")
    try:
        pair.start()
        with client_of(pair.other.url) as client, pytest.raises(openai.InternalServerError) as refusal:
            chatted(client, stream=False)
        assert refusal.value.status_code == 503
        assert "internal_url" in refusal.value.message
        pair.holder.stop()
        pair.holder.set("internal_url", pair.holder.url)
        pair.other.stop()
        pair.holder.start()
        pair.other.start()
        key = pair.holder.add_key("alice")
        with client_of(pair.other.url, key) as client:  # known there at once
            assert chatted(client, stream=False)[0]
        with client_of(pair.other.url, "tml-no") as client, pytest.raises(openai.AuthenticationError):
            chatted(client, stream=False)
        time.sleep(0.5)
        used = rows(
            pair.url, "select owner, sum(sampled_tokens)::int from usage group by owner order by owner"
        )
        assert [owner for owner, _ in used] == ["alice", "local"] or [owner for owner, _ in used] == ["alice"]
    finally:
        pair.close()
