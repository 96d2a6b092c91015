"""Bodies that are too large, queues that are full, clients that hang up: bounded in memory and time."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker
import zstandard
from tinker.proto import tinker_public_pb2 as sdk_wire

from tests.gateway.conftest import KEY, begin_run, clean, outcome, send_pass, send_step
from tests.served import ServedGateway

MB = 1_000_000
TOKENS = [3, 1, 4, 1, 5]
PROTOBUF = {"content-type": "application/x-protobuf"}
SLOW_ENGINE = {"name": "fake", "plugin": "fake", "base_model": "fake/model", "options": {"delay_s": 0.02}}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """A gateway with the default limit of bodies, and low ones for all else."""
    gateway = ServedGateway(
        tmp_path_factory.mktemp("limited"),
        [SLOW_ENGINE],
        max_decompressed_bytes=str(32 * MB),
        max_queued_per_run="5",
        max_queued_samples="3",
        samples_in_engine="1",
        gap_timeout_s="60",
    )
    gateway.start()
    yield gateway
    gateway.close()


@pytest.fixture
def http(limited: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=limited.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def peak(gateway: ServedGateway) -> int:
    """The most memory that the gateway process has ever had, in bytes."""
    lines = Path(f"/proc/{gateway.pid}/status").read_text().splitlines()
    [highest] = [line for line in lines if line.startswith("VmHWM")]
    return int(highest.split()[1]) * 1024


def pass_body(run_id: str, seq_id: int, padding: int = 0) -> bytes:
    """A pass as the official SDK encodes it, with a field behind it that makes it long."""
    message = sdk_wire.ForwardBackwardRequest(model_id=run_id, seq_id=seq_id, loss_fn="cross_entropy")
    return message.SerializeToString() + (b"\x22" + _varint(padding) + b"x" * padding if padding else b"")


def _varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_a_body_of_100_mb_is_refused_and_its_number_consumed(
    http: httpx.Client, limited: ServedGateway
) -> None:
    run_id = begin_run(http)
    before = peak(limited)
    answer = http.post("/api/v1/forward_backward", content=pass_body(run_id, 1, 100 * MB), headers=PROTOBUF)
    assert answer.status_code == 413
    assert "67108864 bytes (setting max_body_bytes)" in clean(answer)["detail"]
    assert "max_body_bytes" in outcome(http, f"{run_id}:1")["error"]
    assert outcome(http, send_pass(http, run_id, 2, TOKENS).json()["request_id"])["metrics"]["loss:sum"] > 0
    assert peak(limited) - before < 150 * MB


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_a_bomb_is_defused_and_its_number_consumed(
    http: httpx.Client, limited: ServedGateway, encoding: str
) -> None:
    run_id = begin_run(http)
    plain = pass_body(run_id, 1, 400 * MB)
    bomb = zstandard.compress(plain) if encoding == "zstd" else gzip.compress(plain, 1)
    assert len(bomb) < 2 * MB
    before, started = peak(limited), time.monotonic()
    answer = http.post(
        "/api/v1/forward_backward", content=bomb, headers={**PROTOBUF, "content-encoding": encoding}
    )
    assert time.monotonic() - started < 10
    assert answer.status_code == 413
    assert "32000000 bytes (setting max_decompressed_bytes)" in clean(answer)["detail"]
    assert peak(limited) - before < 120 * MB
    if encoding == "zstd":  # what SDKs send
        assert "max_decompressed_bytes" in outcome(http, f"{run_id}:1")["error"]
        loss = outcome(http, send_pass(http, run_id, 2, TOKENS).json()["request_id"])["metrics"]["loss:sum"]
        assert loss > 0


def test_many_bombs_at_once_take_turns(tmp_path: Path) -> None:
    """Each is within the limits; all together would take 1 GB and what is made of them as much again."""
    gateway = ServedGateway(tmp_path, body_memory_bytes=str(256 << 20))
    gateway.start()
    bomb = zstandard.compress(b"\x7a" + _varint(200 * MB) + bytes(200 * MB))  # a field that nobody knows
    assert len(bomb) < 0.1 * MB
    headers = {**PROTOBUF, "content-encoding": "zstd", "X-API-Key": KEY}
    before = peak(gateway)

    def send(_: int) -> int:
        answer = httpx.post(
            f"{gateway.url}/api/v1/forward_backward", content=bomb, headers=headers, timeout=60
        )
        return answer.status_code

    try:
        with ThreadPoolExecutor(5) as pool:
            answers = pool.map(send, range(5))
            slowest = 0.0
            for _ in range(10):
                began = time.monotonic()
                assert (
                    httpx.post(f"{gateway.url}/api/v1/create_session", json={}, timeout=60).status_code == 200
                )
                slowest = max(slowest, time.monotonic() - began)
            assert list(answers) == [400] * 5  # it names no run
        assert slowest < 10
        assert peak(gateway) - before < 700 * MB
    finally:
        gateway.close()


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_pass_consumes_its_number_if_it_still_says_which(http: httpx.Client, damage: str) -> None:
    run_id = begin_run(http)
    whole = pass_body(run_id, 1, 5000)
    body = whole[:-100] if damage == "cut" else whole[:100] + b"\xff" * 100
    answer = http.post("/api/v1/forward_backward", content=body, headers=PROTOBUF)
    assert answer.status_code == 400
    assert "ForwardBackwardRequest" in clean(answer)["detail"]
    assert outcome(http, f"{run_id}:1")["category"] == "user"
    assert "metrics" in outcome(http, send_pass(http, run_id, 2, TOKENS).json()["request_id"])


def test_another_runs_number_is_not_consumed(http: httpx.Client) -> None:
    answer = http.post("/api/v1/forward_backward", content=pass_body("x", 1)[:-3], headers=PROTOBUF)
    assert answer.status_code in (400, 404)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_official_client_is_told_of_a_large_body_at_once(limited: ServedGateway) -> None:
    """A long retry would mean that it took the refusal for a passing condition."""
    with tinker.ServiceClient(base_url=limited.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4).result()
        ids = [1] * 40_000
        huge = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(ids),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=ids, dtype="int64"),
                "weights": tinker.TensorData(data=[1.0] * len(ids), dtype="float32"),
            },
        )
        started = time.monotonic()
        with pytest.raises(tinker.TinkerError, match="40000 tokens"):
            client.forward_backward([huge], "cross_entropy").result()
        assert time.monotonic() - started < 10


def test_a_full_queue_of_a_run_refuses_for_the_time_being(http: httpx.Client) -> None:
    run_id, other = begin_run(http), begin_run(http)
    waiting = [send_step(http, run_id, seq_id).status_code for seq_id in range(2, 7)]
    assert waiting == [200] * 5
    refused = send_step(http, run_id, 7)
    assert refused.status_code == 429
    assert "5 operations" in refused.json()["detail"]
    assert "metrics" in outcome(http, send_pass(http, other, 1, TOKENS).json()["request_id"])


def test_a_full_queue_of_samples_refuses_for_the_time_being(http: httpx.Client) -> None:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    sampler = http.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"]
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    answers = [
        http.post(
            "/api/v1/asample",
            json={
                "sampling_session_id": sampler,
                "seq_id": seq_id,
                "prompt": prompt,
                "sampling_params": {"max_tokens": 30, "stop": []},
            },
        )
        for seq_id in range(8)
    ]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    assert {answer.status_code for answer in refused} == {429}
    assert "samples of yours" in refused[0].json()["detail"]
    for answer in answers:
        if answer.status_code == 200:
            assert len(outcome(http, answer.json()["request_id"])["sequences"][0]["tokens"]) == 30


def test_clients_that_hang_up_leave_no_traceback(http: httpx.Client, limited: ServedGateway) -> None:
    head = (
        f"POST /api/v1/optim_step HTTP/1.1\r\nHost: 127.0.0.1:{limited.port}\r\nX-API-Key: {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    )
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", limited.port)) as connection:
            connection.sendall(head.encode())
    run_id = begin_run(http)
    for text in (
        "",
        "junk\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", limited.port)) as connection:
            connection.sendall(text.encode())
    assert "metrics" in outcome(http, send_pass(http, run_id, 1, TOKENS).json()["request_id"])
    assert "Traceback" not in limited.log.read_text()


def test_clients_that_stop_waiting_are_not_waited_for(limited: ServedGateway, http: httpx.Client) -> None:
    """The hold of a result is 30 s; a stop that comes meanwhile is not kept by clients that have left."""
    request_id = send_step(http, begin_run(http), 2).json()["request_id"]
    descriptors = Path(f"/proc/{limited.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/api/v1/retrieve_future", json={"request_id": request_id}, timeout=0.05)
    started = time.monotonic()
    while len(list(descriptors.iterdir())) > before + 5:
        assert time.monotonic() - started < 10
        time.sleep(0.1)
    assert limited.stop() == 0
    assert time.monotonic() - started < 10
