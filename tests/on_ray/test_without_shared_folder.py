"""Nodes and a gateway that have no folder in common, only the URL of a bucket."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest

from tests.gateway.conftest import begin_run, outcome
from tests.object_store import new_bucket, object_store
from tests.on_ray.cluster import RayCluster, token
from tests.on_ray.test_nodes import (
    PATIENCE_S,
    SAMPLER,
    STEPS,
    TRAINER,
    nodes_of,
    sample,
    speaking,
    train,
    until,
)
from tests.served import ServedGateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Its URL; gateways and nodes find in the environment how it is reached, and Ray's token."""
    pytest.importorskip("ray")
    with object_store() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in token().items():
            patch.setenv(name, value)
        yield new_bucket(server, patch)


@pytest.fixture
def cluster(bucket: str, tmp_path: Path) -> Iterator[RayCluster]:
    made = RayCluster({}, tmp_path / "log")
    yield made
    made.close()


def end_of(http: httpx.Client, run_id: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A checkpoint as it is downloaded, and what a sampler of the same weights draws."""
    body = {"model_id": run_id, "seq_id": 2 * STEPS + 1, "path": "end"}
    path = outcome(http, http.post("/api/v1/save_weights_for_sampler", json=body).json()["request_id"])[
        "path"
    ]
    archive = http.get(f"/api/v1/training_runs/{run_id}/checkpoints/sampler_weights/end/archive")
    content = http.get(archive.headers["Location"]).content if archive.is_redirect else archive.content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = {
            each.name: file.read()
            for each in tar.getmembers()
            if each.name.endswith(".safetensors") and (file := tar.extractfile(each))
        }
    assert files
    return files, sample(http, model_path=path)


def test_a_run_goes_on_where_its_first_node_has_left_nothing(
    bucket: str, cluster: RayCluster, tmp_path: Path
) -> None:
    """As with engines of the gateway's own machine and its disk, none of which dies: numbers, files and tokens."""
    alone = ServedGateway(tmp_path / "alone", [TRAINER, SAMPLER])
    try:
        alone.start()
        with speaking(alone) as http:
            run_id = begin_run(http)
            expected = train(http, run_id), *end_of(http, run_id)
    finally:
        alone.close()
    place = {"address": cluster.address, "wait_s": PATIENCE_S}
    gateway = ServedGateway(
        tmp_path / "gateway",
        [{**TRAINER, "ray": place}, {**SAMPLER, "ray": {**place, "resources": {"sampling": 1}}}],
        engine_owner_timeout_s="3",
        snapshot_steps="20",
        storage_url=bucket,
    )
    disks = [tmp_path / "first", tmp_path / "second"]
    for disk in disks:
        disk.mkdir()
    cluster.add("first", num_cpus=1, env_vars={"TMPDIR": str(disks[0])})
    try:
        gateway.launch()
        until(gateway, 1)
        cluster.add("second", num_cpus=2, resources={"sampling": 1}, env_vars={"TMPDIR": str(disks[1])})
        gateway.wait_until_ready(PATIENCE_S)
        until(gateway, 2)
        assert [len(copies(disk)) for disk in disks] == [1, 1], "each node has a disk of its own"
        with speaking(gateway) as http:
            run_id = begin_run(http)
            results = train(http, run_id, lambda: cluster.remove("first"))
            assert len(until(gateway, 3)) == 3
            assert (
                "is restored in engine trainer from the snapshot after operation" in gateway.log.read_text()
            )
            copied = gateway.data_dir / "copies"
            assert not list(copied.glob("*/*")), "nothing has passed through the gateway's folder"
            assert (results, *end_of(http, run_id)) == expected
        assert not (gateway.data_dir / "storage").exists()
        files, root = fsspec.url_to_fs(bucket)
        assert {path.removeprefix(f"{root}/").partition("/")[0] for path in files.find(root)} >= {
            "checkpoints",
            "snapshots",
        }
        assert gateway.stop() == 0
        assert nodes_of(gateway)
    finally:
        gateway.close()


def copies(disk: Path) -> list[Path]:
    """Folders of engines on a node."""
    return list(disk.glob("tandem-place-*"))
