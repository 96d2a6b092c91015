"""Three replicas under load: whichever answers, the tokens are the same; one that dies is not missed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.postgres import PostgresServer
from tests.replicas.conftest import (
    alone,
    client_of,
    drawn,
    engines,
    future,
    prompt,
    sampler,
    send,
    states,
    until,
    until_ready,
)
from tests.served import ServedGateway

NAMES = ("sampler", "sampler-2", "sampler-3")
DEADLY = 222


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.slow])],
    scope="module",
)
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    """Three replicas; one that has died is away for a minute. With the shorter lease it is given back meanwhile."""
    settings = {"samples_in_engine": "16", "engine_restart_delay_s": "60", "lease_s": "150"}
    if request.param == "postgres":
        settings["lease_s"] = "15"
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    served = ServedGateway(tmp_path_factory.mktemp("three"), [sampler(3, delay_s=0.02)], **settings)
    served.start()
    yield served
    served.close()


@pytest.fixture
def client(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with client_of(gateway.url) as client:
        yield client


def test_each_replica_is_told_of(client: httpx.Client) -> None:
    until_ready(client, *NAMES)
    for request_id in [send(client, prompt(number), seed=number) for number in range(60)]:
        drawn(client, request_id)
    metrics = client.get("/admin/v1/metrics").json()["engines"]
    assert metrics.keys() == set(NAMES)
    until(lambda: not any(each["open_samples"] for each in engines(client).values()), "all are idle")
    assert {each["base_model"] for each in engines(client).values()} == {"fake/model"}
    assert client.get("/readyz").json()["engines"] == dict.fromkeys(NAMES, "ready")
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["fake/model"]
    answers = [
        client.post(
            "/v1/completions", json={"model": "fake/model", "prompt": [65], "max_tokens": 3, "seed": 5}
        )
        for _ in range(4)
    ]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_a_sampler_and_what_it_has_computed_stay_together(client: httpx.Client) -> None:
    until_ready(client, *NAMES)
    session = client.post("/api/v1/create_session", json={}).json()["session_id"]
    homes = []
    for number in range(6):
        body = {"session_id": session, "sampling_session_seq_id": number, "base_model": "fake/model"}
        made = client.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"]
        beginning = [65 + number] * 40
        ids = []
        for turn in range(3):  # a conversation: each prompt begins with the one before
            more = {"base_model": None, "sampling_session_id": made, "seq_id": turn}
            ids.append(send(client, beginning + [66] * 9 * turn, seed=turn, **more))
            drawn(client, ids[-1])
        [home] = {future(client, request_id)["engine"] for request_id in ids}
        homes.append(home)
    assert len(set(homes)) > 1  # and not all at one place


def test_one_is_killed_and_all_are_answered_with_the_same_tokens(
    client: httpx.Client, tmp_path: Path
) -> None:
    """The last one here: of the three replicas there are two then."""
    until_ready(client, *NAMES)
    sent = {number: send(client, prompt(number), seed=number) for number in range(90)}
    again = {number: send(client, prompt(7), seed=7) for number in range(30)}  # one request, thirty times
    victim = engines(client)["sampler-2"]
    assert victim["open_samples"] > 0
    os.kill(victim["pid"], signal.SIGKILL)
    later = {number: send(client, prompt(number), seed=number) for number in range(90, 100)}
    for number, request_id in (sent | later).items():
        assert drawn(client, request_id) == alone(prompt(number), number, str(tmp_path)), number
    assert all(drawn(client, request_id) == drawn(client, sent[7]) for request_id in again.values())
    # It is away for longer than all of this has taken: nobody has waited for it.
    assert states(client) == {"sampler": "ready", "sampler-2": "down", "sampler-3": "ready"}
    assert client.get("/readyz").status_code == 200
    told = [future(client, request_id) for request_id in (*sent.values(), *again.values())]
    assert {each["engine"] for each in told} >= {"sampler", "sampler-3"}
    assert {each["status"] for each in told} == {"done"}
    assert any(each["attempts"] == 2 for each in told)  # which the one that died was drawing
    assert {future(client, each)["engine"] for each in later.values()} <= {"sampler", "sampler-3"}


@pytest.mark.slow
def test_a_sample_that_kills_engines_fails_and_nothing_beside_it_does(tmp_path: Path) -> None:
    engine = sampler(3, delay_s=0.01, crash_on_token=DEADLY)
    served = ServedGateway(tmp_path / "deadly", [engine], engine_restart_delay_s="0.1")
    served.start()
    try:
        with client_of(served.url) as client:
            until_ready(client, *NAMES)
            sent = [send(client, prompt(number), seed=number) for number in range(30)]
            deadly = send(client, [65, DEADLY], seed=1)
            sent += [send(client, prompt(number), seed=number) for number in range(30, 60)]
            for request_id in sent:
                drawn(client, request_id)
            until(lambda: future(client, deadly)["status"] == "failed", "what kills engines has failed")
            told = future(client, deadly)
            assert "the engine died" in told["error"]
            assert told["deaths"] <= 3  # over all replicas: they share what they know of it
            assert {future(client, request_id)["status"] for request_id in sent} == {"done"}
            until_ready(client, *NAMES)
    finally:
        served.close()
