"""Engines on the nodes of a real Ray cluster, behind a gateway as its users meet it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.on_ray.cluster import RayCluster
from tests.served import ServedGateway
from tests.threads import beside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 400
PATIENCE_S = 120.0
TRAINER: dict[str, Any] = {
    "name": "trainer",
    "plugin": "fake",
    "base_model": "fake/model",
    "roles": ["train"],
}
SAMPLER: dict[str, Any] = {
    "name": "sampler",
    "plugin": "fake",
    "base_model": "fake/model",
    "roles": ["sample"],
}


def nodes_of(gateway: ServedGateway) -> list[str]:
    """The nodes on which engines were placed, in the order in which that was."""
    return re.findall(r"it runs on ([0-9a-f]+) ", gateway.log.read_text())


def until(gateway: ServedGateway, placed: int) -> list[str]:
    """Waits until engines were placed so many times."""
    deadline = time.monotonic() + PATIENCE_S
    while len(found := nodes_of(gateway)) < placed:
        assert time.monotonic() < deadline, gateway.log.read_text()[-4000:]
        time.sleep(0.1)
    return found


def speaking(gateway: ServedGateway) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60)


def send(http: httpx.Client, run_id: str, steps: range) -> list[str]:
    """Passes and steps, none of which is waited for; what was promised."""
    promises = []
    for step in steps:
        tokens = [(step * 31 + 7 * place) % 250 for place in range(13)]
        promises.append(send_pass(http, run_id, 2 * step + 1, tokens).json()["request_id"])
        promises.append(send_step(http, run_id, 2 * step + 2).json()["request_id"])
    return promises


def results(http: httpx.Client, promises: list[str]) -> list[dict[str, Any]]:
    """What has become of them, without what depends on the time."""
    found = [outcome(http, promise) for promise in promises]
    assert all("metrics" in result or "loss_fn_outputs" in result for result in found), found
    return found


def train(
    http: httpx.Client, run_id: str, meanwhile: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The results of all steps; `meanwhile` is called beside the second half."""
    begun = results(http, send(http, run_id, range(STEPS // 2)))
    happening = beside(meanwhile)
    rest = results(http, send(http, run_id, range(STEPS // 2, STEPS)))
    happening.result(PATIENCE_S)
    return begun + rest


def saved(gateway: ServedGateway, http: httpx.Client, run_id: str) -> dict[str, bytes]:
    """The files of a run's state by their names."""
    body = {"model_id": run_id, "seq_id": 2 * STEPS + 1, "path": "end"}
    result = outcome(http, http.post("/api/v1/save_weights", json=body).json()["request_id"])
    assert "path" in result, result
    storage = gateway.data_dir / "storage" / "checkpoints"
    [folder] = [path for path in storage.iterdir() if not path.name.startswith(".")]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    assert files
    return files


def sample(http: httpx.Client, **whose: str) -> dict[str, Any]:
    """Of the base model, if nothing else is said."""
    body = {
        "base_model": "fake/model",
        **whose,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 8, "seed": 3},
        "num_samples": 4,
    }
    result = outcome(http, http.post("/api/v1/asample", json=body).json()["request_id"])
    assert result.get("type") == "sample", result
    return result


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], dict[str, bytes], Any]]:
    """What the same calls give with engine processes of the gateway's own machine, none of which dies."""
    gateway = ServedGateway(tmp_path_factory.mktemp("here"), [TRAINER, SAMPLER])
    try:
        gateway.start()
        with speaking(gateway) as http:
            run_id = begin_run(http)
            yield train(http, run_id), saved(gateway, http, run_id), sample(http)["sequences"]
    finally:
        gateway.close()


def test_a_run_goes_on_when_the_node_that_trains_it_is_killed(
    cluster: RayCluster, tmp_path: Path, expected: tuple[list[Any], dict[str, bytes], Any]
) -> None:
    """Bit by bit as if nothing had happened, on the node that is left; sampling there goes on meanwhile."""
    place = {"address": cluster.address, "wait_s": PATIENCE_S}
    gateway = ServedGateway(
        tmp_path,
        [{**TRAINER, "ray": place}, {**SAMPLER, "ray": {**place, "resources": {"sampling": 1}}}],
        engine_owner_timeout_s="3",
    )
    cluster.add("first", num_cpus=1)
    try:
        gateway.launch()
        [training] = until(gateway, 1)
        cluster.add("second", num_cpus=2, resources={"sampling": 1})
        gateway.wait_until_ready(PATIENCE_S)
        assert len({training, until(gateway, 2)[1]}) == 2, "one of them is on each node"
        with speaking(gateway) as http:
            assert sample(http)["sequences"] == expected[2]
            run_id = begin_run(http)
            assert train(http, run_id, lambda: cluster.remove("first")) == expected[0]
            first, second, again = until(gateway, 3)
            assert (first, again) == (training, second)
            assert saved(gateway, http, run_id) == expected[1]
            assert sample(http)["sequences"] == expected[2]
        assert gateway.stop() == 0
    finally:
        gateway.close()
        cluster.remove("second")
