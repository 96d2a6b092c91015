"""More replicas and fewer, while samples come all the time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

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
from tests.threads import beside

NAMES = ("sampler", "sampler-2", "sampler-3")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path / "data", [sampler(1, delay_s=0.02)], samples_in_engine="16", lease_s="3")
    served.start()
    yield served
    served.close()


def load(url: str, ends: threading.Event) -> dict[int, str]:
    """Samples, some in flight all the time, until the end; their ids."""
    sent: dict[int, str] = {}
    with client_of(url) as client:
        while not ends.is_set():
            sent[len(sent)] = send(client, prompt(len(sent)), seed=len(sent))
            if len(sent) > 60:
                drawn(client, sent[len(sent) - 60])
    return sent


def replicas(client: httpx.Client, smallest: int, largest: int) -> None:
    bounds = {"min": smallest, "max": largest}
    answer = client.put("/admin/v1/engines/sampler/replicas", json=bounds)
    assert answer.status_code == 200, answer.text
    assert answer.json()["wanted"] == largest


def test_from_one_to_three_to_one_by_an_admin_under_load(gateway: ServedGateway, tmp_path: Path) -> None:
    ends = threading.Event()
    loading = beside(load, gateway.url, ends)
    try:
        with client_of(gateway.url) as client:
            replicas(client, 3, 3)
            until_ready(client, *NAMES)
            until(lambda: all(each["open_samples"] > 0 for each in engines(client).values()), "all have work")
            pids = [each["pid"] for each in engines(client).values()]
            replicas(client, 1, 1)
            until_ready(client, "sampler")
            until(lambda: len(gateway.engine_pids()) == 1, "the other processes have ended")
            assert gateway.engine_pids()[0] in pids
            ends.set()
            sent = loading.result(60)
            told = {}
            for number, request_id in sent.items():
                assert drawn(client, request_id) == alone(prompt(number), number, str(tmp_path))
                told[number] = future(client, request_id)
    finally:
        ends.set()
    assert {each["engine"] for each in told.values()} == set(NAMES)
    assert {each["deaths"] for each in told.values()} == {0}
    assert max(each["attempts"] for each in told.values()) == 1  # what was being drawn was finished first


@pytest.mark.slow
def test_the_number_follows_what_there_is_to_do(tmp_path: Path) -> None:
    bounds = {"min": 1, "max": 3, "samples_each": 20, "idle_s": 1.0}
    engine = sampler(bounds, delay_s=0.05)
    served = ServedGateway(tmp_path / "data", [engine], samples_in_engine="8")
    served.start()
    try:
        with client_of(served.url) as client:
            assert states(client) == {"sampler": "ready"}
            sent = [send(client, prompt(number), seed=number) for number in range(150)]
            until_ready(client, *NAMES)
            for request_id in sent:
                drawn(client, request_id)
            # They had all been sent to the first one; those that waited went to others when there were others.
            assert {future(client, request_id)["engine"] for request_id in sent} == set(NAMES)
            until_ready(client, "sampler")
            told = client.get("/admin/v1/engines/sampler/replicas").json()
            assert told == {
                "engine": "sampler",
                "min": 1,
                "max": 3,
                "wanted": 1,
                "replicas": ["sampler"],
                "set_by_admin": False,
            }
    finally:
        served.close()


@pytest.mark.slow
def test_samples_of_replicas_that_are_no_more_are_drawn_by_those_there_are(
    gateway: ServedGateway, tmp_path: Path
) -> None:
    with client_of(gateway.url) as client:
        replicas(client, 3, 3)
        until_ready(client, *NAMES)
        sent = [send(client, prompt(number), seed=number) for number in range(120)]
        gateway.kill()
        gateway.start()
        until_ready(client, *NAMES)  # an admin's word holds over a restart
        gateway.kill()
    gateway.set("engines", json.dumps([sampler(1, delay_s=0.02)]))
    gateway.start()
    with client_of(gateway.url) as client:
        assert client.delete("/admin/v1/engines/sampler/replicas").json()["wanted"] == 1
        for number, request_id in enumerate(sent):
            assert drawn(client, request_id) == alone(prompt(number), number, str(tmp_path))
        until_ready(client, "sampler")


@pytest.mark.slow
def test_only_an_admin_decides_and_only_within_reason(tmp_path: Path) -> None:
    trainer = {"name": "trainer", "plugin": "fake", "base_model": "fake/model"}
    served = ServedGateway(tmp_path / "data", [trainer, {**sampler(1), "devices": ["0", "1"]}])
    served.start()
    address = "/admin/v1/engines/{}/replicas"
    try:
        with client_of(served.url) as client:  # no keys: everybody on this machine is an admin
            for name, bounds, status, word in (
                ("sampler", {"min": 2, "max": 1}, 400, "min is 2 and max is 1"),
                ("sampler", {"min": 1, "max": 65}, 422, "max"),
                ("sampler", {"min": 1}, 422, "max"),
                ("sampler", {"min": 1, "max": 3}, 400, "devices for 2"),
                ("trainer", {"min": 1, "max": 2}, 400, "roles ="),
                ("sampler-2", {"min": 1, "max": 2}, 404, "no engine 'sampler-2'"),
            ):
                answer = client.put(address.format(name), json=bounds)
                assert answer.status_code == status, answer.text
                assert word in answer.text
            bobs = served.add_key("bob")
            until(lambda: client.get(address.format("sampler")).status_code == 401, "keys count")
            client.headers["X-API-Key"] = bobs
            assert client.get(address.format("sampler")).json()["wanted"] == 1
            assert client.put(address.format("sampler"), json={"min": 1, "max": 2}).status_code == 403
            assert client.delete(address.format("sampler")).status_code == 403
            assert states(client) == {"trainer": "ready", "sampler": "ready"}
    finally:
        served.close()


@pytest.mark.slow
def test_each_replica_sees_its_own_devices(tmp_path: Path) -> None:
    served = ServedGateway(tmp_path / "data", [{**sampler(2), "devices": ["0,1", "GPU-7"]}])
    served.start()
    try:
        with client_of(served.url) as client:
            until_ready(client, "sampler", "sampler-2")
            seen = [
                _environment(engine["pid"])["CUDA_VISIBLE_DEVICES"] for engine in engines(client).values()
            ]
            assert seen == ["0,1", "GPU-7"]
    finally:
        served.close()


def _environment(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if line)
