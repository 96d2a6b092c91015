"""A served gateway with the numpy engine, once on SQLite and once on PostgreSQL, for every test in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker

from tests.postgres import PostgresServer
from tests.served import ServedGateway

KEY = "tml-test"
VOCABULARY = 250
RETRIED = {408, 409, 429}
"""Besides 5xx: the statuses that the official SDK repeats for minutes."""


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    """The gateway process; it keeps running for all tests of a module."""
    settings = {"gap_timeout_s": "2", "max_body_bytes": "2000000"}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    gateway = ServedGateway(tmp_path_factory.mktemp("gateway"), None, **settings)
    gateway.start()
    yield gateway
    gateway.stop()
    gateway.close()


@pytest.fixture
def service(served: ServedGateway) -> Iterator[tinker.ServiceClient]:
    """The official SDK."""
    with tinker.ServiceClient(base_url=served.url, api_key=KEY) as client:
        yield client


@pytest.fixture
def http(served: ServedGateway) -> Iterator[httpx.Client]:
    """Plain HTTP with a key."""
    with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def datum(seed: int = 0, length: int = 12) -> tinker.Datum:
    """An example with text that depends on the seed."""
    tokens = [(seed * 31 + 7 * position) % VOCABULARY for position in range(length + 1)]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * length, dtype="float32"),
        },
    )


def json_datum(tokens: list[int]) -> dict[str, Any]:
    """An example in the JSON form of older SDKs."""
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64"},
            "weights": {"data": [1.0] * (len(tokens) - 1), "dtype": "float32"},
        },
    }


def begin_run(http: httpx.Client, rank: int = 4, seed: int = 1) -> str:
    """A fresh run through plain HTTP; its id."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "fake/model",
        "lora_config": {"rank": rank, "seed": seed},
    }
    promise = http.post("/api/v1/create_model", json=body).json()
    result = outcome(http, promise["request_id"])
    assert result["type"] == "create_model", result
    return str(promise["model_id"])


def send_pass(
    http: httpx.Client, run_id: str, seq_id: int, tokens: list[int], **changes: Any
) -> httpx.Response:
    """A forward_backward in JSON."""
    given = {"data": [json_datum(tokens)], "loss_fn": "cross_entropy", **changes}
    body = {"model_id": run_id, "seq_id": seq_id, "forward_backward_input": given}
    return http.post("/api/v1/forward_backward", json=body)


def send_step(http: httpx.Client, run_id: str, seq_id: int, **params: Any) -> httpx.Response:
    """An optimizer step."""
    adam = {"learning_rate": 0.01, **params}
    return http.post("/api/v1/optim_step", json={"model_id": run_id, "seq_id": seq_id, "adam_params": adam})


def outcome(http: httpx.Client, request_id: str) -> dict[str, Any]:
    """What becomes of a promise."""
    while True:
        body: dict[str, Any] = http.post("/api/v1/retrieve_future", json={"request_id": request_id}).json()
        if body.get("type") != "try_again":
            return body


def clean(response: httpx.Response) -> dict[str, Any]:
    """The body of an answer that a permanent error may have."""
    assert response.status_code < 500, response.text
    assert response.status_code not in RETRIED, response.text
    for sign in ("Traceback", 'File "', ".py"):
        assert sign not in response.text
    body: dict[str, Any] = response.json()
    return body
