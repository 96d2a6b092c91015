"""A gateway that is told to end: what is at hand is finished, nothing is lost, and its successor need not wait."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.gateway.conftest import KEY, begin_run, datum, outcome, send_pass
from tests.postgres import PostgresServer
from tests.served import FAKE_ENGINE, ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
STEPS = 20
TOKENS = [1, 2, 3, 4]
ADAM = tinker.AdamParams(learning_rate=0.01)
Start = Callable[..., ServedGateway]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts gateways on one data folder and one database, one after the other."""
    database = {}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        database["database_url"] = server.url(server.create_database(template=template))
    started: list[ServedGateway] = []

    def new(delay_s: float = 0.0, **settings: str) -> ServedGateway:
        engine = {**FAKE_ENGINE, "options": {"delay_s": delay_s}}
        gateway = ServedGateway(tmp_path / "data", [engine], **database, **settings)
        started.append(gateway)
        gateway.start()
        return gateway

    yield new
    for gateway in started:
        gateway.close()


def client_of(gateway: ServedGateway) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60)


def ends_within(gateway: ServedGateway, seconds: float) -> None:
    began = time.monotonic()
    assert gateway.wait() == 0
    assert time.monotonic() - began < seconds


def test_a_call_at_hand_is_finished_and_what_is_accepted_meanwhile_is_done_by_the_next_process(
    start: Start,
) -> None:
    gateway = start(delay_s=2.0, lease_s="120")
    with client_of(gateway) as http, ThreadPoolExecutor(1) as pool:
        run_id = begin_run(http)
        at_hand, queued = (send_pass(http, run_id, seq_id, TOKENS).json() for seq_id in (1, 2))
        polled = pool.submit(outcome_of_one_poll, http, at_hand)
        time.sleep(1.0)
        gateway.signal(signal.SIGTERM)
        time.sleep(0.1)
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["draining"]) == (503, True)
        accepted = send_pass(http, run_id, 3, TOKENS).json()
        assert polled.result()["metrics"]["loss:sum"] > 0
        ends_within(gateway, 15)
    successor = start()  # within its 60 s, though the first one's lease would run for 120
    with client_of(successor) as http:
        results = [outcome(http, promise["request_id"]) for promise in (at_hand, queued, accepted)]
    assert len({result["metrics"]["loss:sum"] for result in results}) == 1
    restored = f"run {run_id} is restored in engine fake from its log alone: 2 operations applied again"
    assert restored in successor.log.read_text()


def outcome_of_one_poll(http: httpx.Client, promise: dict[str, Any]) -> dict[str, Any]:
    body = {"request_id": promise["request_id"]}
    answer: dict[str, Any] = http.post("/api/v1/retrieve_future", json=body).json()
    return answer


def test_what_takes_longer_than_the_bound_is_repeated_by_the_next_process(start: Start) -> None:
    gateway = start(delay_s=20.0, engine_hang_s="100", drain_s="1")
    with client_of(gateway) as http:
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model"}
        promise = http.post(
            "/api/v1/create_model", json={**create, "lora_config": {"rank": 4, "seed": 1}}
        ).json()
        time.sleep(0.3)
        gateway.signal(signal.SIGTERM)
        ends_within(gateway, 6)
    with client_of(start()) as http:
        assert outcome(http, promise["request_id"])["type"] == "create_model"


def test_an_upload_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "data")
    gateway.start()
    try:
        with socket.create_connection(("127.0.0.1", gateway.port)) as upload:
            head = "POST /api/v1/forward_backward HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            upload.sendall(f"{head}Content-Type: application/json\r\nX-API-Key: {KEY}\r\n\r\n{{".encode())
            time.sleep(0.3)
            gateway.signal(signal.SIGTERM)
            ends_within(gateway, 12)
    finally:
        gateway.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: int) -> None:
    slow = {**FAKE_ENGINE, "options": {"delay_s": 8.0}}
    gateway = ServedGateway(tmp_path / "data", [slow])
    gateway.start()
    try:
        [engine] = gateway.engine_pids()
        with client_of(gateway) as http:
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            create = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model"}
            http.post("/api/v1/create_model", json={**create, "lora_config": {"rank": 4, "seed": 1}})
        time.sleep(0.3)
        gateway.signal(signal.SIGTERM)
        time.sleep(0.5)
        began = time.monotonic()
        gateway.signal(number)
        assert gateway.wait() == 128 + number
        assert time.monotonic() - began < 2
        deadline = time.monotonic() + 5
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() < deadline, "the engine outlives its gateway"
            time.sleep(0.05)
    finally:
        gateway.close()


def test_openais_clients_get_what_is_under_way_and_are_told_to_come_back(tmp_path: Path) -> None:
    slow = {**FAKE_ENGINE, "options": {"delay_s": 0.05}}
    gateway = ServedGateway(tmp_path / "data", [slow])
    gateway.start()
    try:
        body = {"model": "fake/model", "prompt": "a", "max_tokens": 30, "seed": 1, "ignore_eos": True}
        with client_of(gateway) as http:
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as under_way:
                lines = under_way.iter_lines()
                assert next(lines).startswith("data: ")
                gateway.signal(signal.SIGTERM)
                time.sleep(0.1)
                refused = http.post("/v1/completions", json=body)
                assert list(lines)[-2:] == ["data: [DONE]", ""]
            assert refused.status_code == 503
            assert "the gateway shuts down" in refused.json()["error"]["message"]
            assert refused.headers["Retry-After"]
        ends_within(gateway, 5)
    finally:
        gateway.close()


# ---------------------------------------------------------------------------- under load


def train(gateway: ServedGateway, disasters: dict[int, Callable[[], None]]) -> tuple[list[float], list[Any]]:
    """Losses of a pipelined run and what is sampled beside it; at some steps something happens."""
    prompt = tinker.ModelInput.from_ints([1, 2, 3])
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        sampler = service.create_sampling_client(base_model="fake/model").result()
        passes, steps, samples = [], [], []
        for step in range(STEPS):
            passes.append(client.forward_backward([datum(step)], "cross_entropy"))
            steps.append(client.optim_step(ADAM))
            params = tinker.SamplingParams(max_tokens=6, seed=step)
            samples.append(sampler.sample(prompt, num_samples=1, sampling_params=params))
            if step in disasters:
                disasters[step]()
        losses = [future.result().metrics["loss:sum"] for future in passes]
        norms = [future.result().metrics["unclipped_grad_l2:mean"] for future in steps]  # type: ignore[index]
        tokens = [future.result().sequences[0].tokens for future in samples]
    return losses + norms, tokens


@pytest.mark.slow
def test_a_restart_under_load_changes_no_number(start: Start, tmp_path: Path) -> None:
    calm = ServedGateway(tmp_path / "calm")
    calm.start()
    try:
        expected = train(calm, {})
    finally:
        calm.close()
    gateway = start(delay_s=0.02)
    statuses: list[int] = []

    def restart() -> None:
        gateway.wait_until_ready()  # before it has begun to listen to signals they end it as they end any process
        statuses.append(gateway.stop(signal.SIGTERM))
        gateway.launch()

    assert train(gateway, {4: restart, 12: restart}) == expected
    assert statuses == [0, 0]
    assert "died" not in gateway.log.read_text()
