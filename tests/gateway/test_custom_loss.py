"""Losses that the official SDK uploads: the same weights as when it computes them itself, and part of the log."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gateway.tinker.custom_losses import MAX_BODY_BYTES, MAX_LOSSES
from tests.gateway.conftest import KEY, clean, outcome
from tests.hf.conftest import model_folders
from tests.served import ServedGateway

__all__ = ["model_folders"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

T = torch.Tensor
STEPS = 5


def slicing(logprobs: T, advantages: T) -> tuple[T, dict[str, T]]:
    loss = -(logprobs[1:] * advantages[:-1]).sum() - logprobs[..., 0].square() + logprobs[::2].mean()
    return loss, {"custom/first:mean": logprobs[0]}


def softmax_like(logprobs: T, advantages: T) -> tuple[T, dict[str, T]]:
    share = F.softmax(advantages, dim=-1)
    loss = -(F.logsigmoid(logprobs + 1.0) * share).sum() + torch.logsumexp(logprobs, dim=0)
    return loss, {"custom/entropy:sum": -(share * share.log()).sum()}


def several_inputs(logprobs: T, advantages: T, mask: T, old: T, scale: T) -> tuple[T, dict[str, T]]:
    ratio = torch.exp(logprobs - old)
    bounded = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = -(torch.where(mask > 0, bounded, 0.0).sum() / mask.sum().clamp_min(1.0)) * scale
    return loss, {"custom/kl:mean": (old - logprobs).mean(), "custom/kept:sum": mask.sum()}


def targets_of_each(logprobs: T, share: T) -> tuple[T, dict[str, T]]:
    return -(torch.softmax(share, dim=-1) * logprobs).sum(), {}


LOSSES: list[tuple[Any, dict[str, int]]] = [
    (slicing, {"logprobs": 1, "advantages": 1}),
    (softmax_like, {"logprobs": 1, "advantages": 1}),
    (several_inputs, {"logprobs": 1, "advantages": 1, "mask": 1, "old": 1, "scale": 0}),
    (targets_of_each, {"logprobs": 2, "share": 2}),
]


def examples(step: int, rank: int) -> list[tinker.Datum]:
    """Data of different lengths with every input that the losses read, and one that none does."""
    data = []
    for index, length in enumerate((7, 16, 4, 11)):
        rng = np.random.default_rng([step, index])
        shape = (length,) if rank == 1 else (length, 3)
        inputs: dict[str, Any] = {
            "target_tokens": torch.from_numpy(rng.integers(0, 250, shape)),
            "advantages": torch.from_numpy(rng.normal(0, 1, length).astype(np.float32)),
            "mask": torch.from_numpy((rng.random(length) > 0.3).astype(np.float32)),
            "old": torch.from_numpy(rng.uniform(-7, -4, length).astype(np.float32)),
            "share": torch.from_numpy(rng.normal(0, 1, (length, 3)).astype(np.float32)),
            "scale": torch.tensor(0.5 + index),
            "unread": torch.ones(3),
        }
        tokens = rng.integers(0, 250, length).tolist()
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs))
    return data


def served(folder: str, data_dir: Path, **settings: str) -> Iterator[ServedGateway]:
    options = {"threads": 1, "device": "cpu"}
    engine = {"name": "hf", "base_model": "test/tied", "model": folder, "options": options}
    gateway = ServedGateway(data_dir, [engine], **settings)
    gateway.start(timeout_s=120)
    yield gateway
    gateway.stop()
    gateway.close()


@pytest.fixture(scope="module")
def gateway(
    model_folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    yield from served(model_folders["tied"], tmp_path_factory.mktemp("custom"))


@pytest.fixture(scope="module")
def client_side(
    model_folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    """A gateway whose flag is off."""
    folder = tmp_path_factory.mktemp("client_side")
    yield from served(model_folders["tied"], folder, custom_loss_server_side="false")


@pytest.fixture
def http(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


@pytest.fixture
def service(gateway: ServedGateway) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as client:
        yield client


Trained = tuple[list[dict[str, float]], dict[str, T], tinker.TrainingClient]


def train(gateway: ServedGateway, service: tinker.ServiceClient, function: Any, ranks: Any) -> Trained:
    """Metrics of each step, the final weights, and whose they are."""
    handle = service.create_custom_loss(function, input_ranks=ranks).result()
    client = service.create_lora_training_client("test/tied", rank=4, seed=11).result()
    metrics = []
    for step in range(STEPS):
        passed = client.forward_backward_custom(examples(step, ranks["logprobs"]), handle)
        stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-3))
        metrics.append(dict(passed.result().metrics))
        stepped.result()
    return metrics, saved(gateway, client), client


def saved(gateway: ServedGateway, client: tinker.TrainingClient) -> dict[str, T]:
    """The factors of a checkpoint that is made now; the newest folder is its."""
    client.save_weights_for_sampler(f"now-{time.time_ns()}").result()
    folders = (gateway.data_dir / "storage" / "checkpoints").iterdir()
    newest = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
    return load_file(newest / "adapter_model.safetensors")


def assert_same_weights(found: dict[str, T], expected: dict[str, T]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        difference = (found[name] - values).norm() / values.norm()
        assert difference <= 1e-6, (name, float(difference))


@pytest.mark.parametrize(("function", "ranks"), LOSSES, ids=[function.__name__ for function, _ in LOSSES])
def test_five_steps_on_the_server_are_five_steps_on_the_client(
    gateway: ServedGateway, client_side: ServedGateway, function: Any, ranks: dict[str, int]
) -> None:
    outcomes = []
    for place, uploads in ((gateway, True), (client_side, False)):
        with tinker.ServiceClient(base_url=place.url, api_key=KEY) as service:
            service.create_lora_training_client("test/tied", rank=4).result()
            assert service.holder.get_client_config().custom_loss_server_side is uploads
            outcomes.append(train(place, service, function, ranks)[:2])
    (metrics, weights), (client_metrics, client_weights) = outcomes
    assert_same_weights(weights, client_weights)
    for found, expected in zip(metrics, client_metrics, strict=True):
        expected.pop("surrogate_loss:sum")  # which only two passes have
        assert found == pytest.approx(expected, rel=1e-5)
    assert any("B" in name and values.abs().max() > 1e-4 for name, values in weights.items())


def test_the_loss_is_part_of_the_log(gateway: ServedGateway, service: tinker.ServiceClient) -> None:
    """The engine dies, then the gateway; what comes next begins with all of the log again, the loss included."""
    function, ranks = LOSSES[2]
    _, weights, client = train(gateway, service, function, ranks)
    (engine,) = gateway.engine_pids()
    os.kill(engine, signal.SIGKILL)
    assert_same_weights(saved(gateway, client), weights)
    gateway.kill()
    gateway.start(timeout_s=120)
    assert_same_weights(saved(gateway, client), weights)
    handle = service.create_custom_loss(softmax_like, input_ranks={"logprobs": 1, "advantages": 1}).result()
    assert client.forward_backward_custom(examples(9, 1), handle).result().metrics["loss:sum"] != 0


# ---------------------------------------------------------------------------- what is refused


def a_session(http: httpx.Client) -> str:
    session: str = http.post("/api/v1/create_session", json={}).json()["session_id"]
    return session


def a_run(http: httpx.Client, session: str) -> str:
    body = {"session_id": session, "model_seq_id": 0, "base_model": "test/tied", "lora_config": {"rank": 4}}
    promise = http.post("/api/v1/create_model", json=body).json()
    assert outcome(http, promise["request_id"])["type"] == "create_model"
    return str(promise["model_id"])


def node(op: str, name: str, target: str, *args: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


def body_of(session: str, *nodes: dict[str, Any], number: int = 0, **changes: Any) -> dict[str, Any]:
    """The sum of the log-probs, after some other nodes."""
    total = {"ref": "total"}
    all_nodes = [
        node("placeholder", "logprobs", "logprobs"),
        *nodes,
        node("call_method", "total", "sum", {"ref": "logprobs"}),
        node("output", "output", "output", {"tuple": [total, {"dict": {"custom/total:sum": total}}]}),
    ]
    return {
        "session_id": session,
        "custom_loss_seq_id": number,
        "name": "made",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": all_nodes},
        "type": "create_custom_loss",
        **changes,
    }


def create(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post("/api/v1/create_custom_loss", json=body)
    return outcome(http, clean(response)["request_id"])


def use(http: httpx.Client, run: str, seq_id: int, config: dict[str, Any]) -> dict[str, Any]:
    """A pass with a custom loss, in the JSON form that says the same as the SDK's protobuf."""
    datum = {
        "model_input": {"chunks": [{"tokens": [1, 2, 3]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64"}},
    }
    given = {"data": [datum], "loss_fn": "custom", "loss_fn_config": config}
    body = {"model_id": run, "seq_id": seq_id, "forward_backward_input": given}
    response = http.post("/api/v1/forward_backward", json=body)
    return outcome(http, clean(response)["request_id"])


def test_a_loss_is_created_once(http: httpx.Client) -> None:
    """A repeated request finds the first; another loss under its number is refused, and not taken for it."""
    session = a_session(http)
    found = create(http, body_of(session))
    assert found == {"loss_id": f"{session}:loss:0", "type": "create_custom_loss"}
    assert create(http, body_of(session)) == found
    others = (
        body_of(session, node("call_function", "bad", "os.system", "ls")),
        body_of(session, name="another"),
        body_of(session, node("call_method", "more", "exp", {"ref": "logprobs"})),
    )
    for other in others:
        refused = http.post("/api/v1/create_custom_loss", json=other)
        assert refused.status_code == 422
        assert "custom_loss_seq_id is that of another loss" in clean(refused)["detail"]
    result = use(http, a_run(http, session), 1, {"loss_id": found["loss_id"]})
    assert result["metrics"]["custom/total:sum"] == pytest.approx(result["metrics"]["loss:sum"])
    logprobs = result["loss_fn_outputs"][0]["logprobs"]["data"]
    assert result["metrics"]["loss:sum"] == pytest.approx(sum(logprobs), rel=1e-5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([node("call_function", "bad", "os.system", "ls")], "calls 'os.system', which is not among"),
        ([node("call_function", "bad", "torch.load", "/etc/passwd")], "calls 'torch.load'"),
        ([node("call_method", "bad", "backward", {"ref": "logprobs"})], "calls the method 'backward'"),
        ([node("get_attr", "bad", "weight")], "op is 'get_attr'"),
        (
            [node("call_function", "bad", "torch.add", {"ref": "logprobs"}, [1.0] * 30_000)],
            "no place for data",
        ),
        ([node("call_function", "bad", "torch.add", {"ref": "logprobs"}, 2**60)], "beyond ±2^53"),
        (
            [node("call_method", f"n{index}", "exp", {"ref": "logprobs"}) for index in range(2500)],
            "at most 2000",
        ),
    ],
)
def test_a_graph_that_cannot_be_rebuilt_is_refused_in_milliseconds(
    http: httpx.Client, bad: list[dict[str, Any]], words: str
) -> None:
    session = a_session(http)
    body = json.dumps(body_of(session, *bad)).encode()
    begun = time.perf_counter()
    response = http.post("/api/v1/create_custom_loss", content=body)
    result = outcome(http, clean(response)["request_id"])
    assert time.perf_counter() - begun < 0.5  # two round trips, on a machine that does other things as well
    assert result["category"] == "user"
    assert words in result["error"]
    refused = use(http, a_run(http, session), 1, {"loss_id": f"{session}:loss:0"})
    assert "there is no such custom loss" in refused["error"]


def test_a_million_nodes_are_refused_without_being_read(http: httpx.Client) -> None:
    session = a_session(http)
    nodes = b",".join([b'{"op":"call_method","name":"x","target":"exp"}'] * 1_000_000)
    body = b'{"session_id":"%s","graph":{"nodes":[%s]}}' % (session.encode(), nodes)
    begun = time.perf_counter()
    response = http.post("/api/v1/create_custom_loss", content=body)
    assert time.perf_counter() - begun < 3  # sending 47 MB
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in clean(response)["detail"]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"graph": {"nodes": "x"}}, 422, "graph.nodes"),
        ({"graph": {"format": 2, "nodes": []}}, 422, "format"),
        ({"custom_loss_seq_id": MAX_LOSSES}, 422, f"at most {MAX_LOSSES} custom losses"),
        ({"name": "a\0b"}, 422, "NUL"),
        ({"name": ""}, 422, "name"),
        ({"session_id": "nobody's"}, 404, "there is no session"),
        ({"learned": True}, 422, "learned"),
    ],
)
def test_a_body_that_is_no_loss_is_told_at_once(
    http: httpx.Client, changes: dict[str, Any], status: int, words: str
) -> None:
    response = http.post("/api/v1/create_custom_loss", json=body_of(a_session(http), **changes))
    assert response.status_code == status
    assert words in clean(response)["detail"]


def test_a_loss_belongs_to_its_session(http: httpx.Client) -> None:
    mine, other = a_session(http), a_session(http)
    loss_id = create(http, body_of(mine))["loss_id"]
    run = a_run(http, other)
    assert "a loss of another session" in use(http, run, 1, {"loss_id": loss_id})["error"]
    for number, config in enumerate(({}, {"loss_id": 3.0}, {"loss_id": loss_id, "beta": 1.0}), start=2):
        assert "loss_fn_config is {'loss_id': …}" in use(http, run, number, config)["error"]
    assert "there is no such custom loss" in use(http, run, 5, {"loss_id": f"{mine}:loss:7"})["error"]
    assert http.post("/api/v1/retrieve_future", json={"request_id": f"{mine}:loss:7"}).status_code == 404


@pytest.mark.parametrize(
    ("version", "told"),
    [("0.38.0", True), ("0.36.0", True), ("1.0.0", True), ("0.35.2", False), ("x", False)],
)
def test_only_an_sdk_that_knows_it_is_told_to_upload(http: httpx.Client, version: str, told: bool) -> None:
    config = http.post("/api/v1/client/config", json={"sdk_version": version}).json()
    assert config["custom_loss_server_side"] is told


def test_where_an_engine_has_none_the_client_computes_them(tmp_path: Path) -> None:
    """The numpy engine has no torch: the same call goes the other way."""
    gateway = ServedGateway(tmp_path)
    gateway.start()
    try:
        with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
            handle = service.create_custom_loss(
                slicing, input_ranks={"logprobs": 1, "advantages": 1}
            ).result()
            assert handle.loss_id is None
            client = service.create_lora_training_client("fake/model", rank=4).result()
            metrics = client.forward_backward_custom(examples(0, 1), handle).result().metrics
            assert {"custom/first:mean", "loss:sum"} <= metrics.keys()
            loss_id = upload_by_hand(gateway, service)
            passed = client.forward_backward(examples(0, 1), "custom", {"loss_id": loss_id})
            with pytest.raises(
                tinker.RequestFailedError, match="forward_backward_custom, runs on the client"
            ):
                passed.result()
    finally:
        gateway.stop()
        gateway.close()


def upload_by_hand(gateway: ServedGateway, service: tinker.ServiceClient) -> str:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        loss_id: str = create(http, body_of(service.holder.get_session_id()))["loss_id"]
        return loss_id
