"""Replicas on the nodes of a real Ray cluster: more and fewer, while samples come all the time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.on_ray.cluster import RayCluster
from tests.on_ray.test_nodes import nodes_of
from tests.replicas.conftest import (
    alone,
    client_of,
    drawn,
    engines,
    future,
    prompt,
    sampler,
    until,
    until_ready,
)
from tests.replicas.test_scaling import NAMES, load, replicas
from tests.served import ServedGateway
from tests.threads import beside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_from_one_to_three_nodes_to_one_under_load(cluster: RayCluster, tmp_path: Path) -> None:
    """No sample fails, and none is drawn otherwise than by an engine that is alone; a node that is not needed is free
    again."""
    for name in ("first", "second", "third"):
        cluster.add(name, num_cpus=1)
    place = {"address": cluster.address, "wait_s": 60}
    gateway = ServedGateway(
        tmp_path / "data", [{**sampler(1, delay_s=0.02), "ray": place}], samples_in_engine="16"
    )
    ends = threading.Event()
    try:
        gateway.start()
        loading = beside(load, gateway.url, ends)
        with client_of(gateway.url) as client:
            replicas(client, 3, 3)
            until_ready(client, *NAMES)
            assert len(set(nodes_of(gateway))) == 3
            until(lambda: all(each["open_samples"] > 0 for each in engines(client).values()), "all have work")
            replicas(client, 1, 1)
            until_ready(client, "sampler")
            until(lambda: len(gateway.engine_pids()) == 1, "what stood in for the others has ended")
            ends.set()
            told = {}
            for number, request_id in loading.result(120).items():
                assert drawn(client, request_id) == alone(prompt(number), number, str(tmp_path))
                told[number] = future(client, request_id)
            assert {each["engine"] for each in told.values()} == set(NAMES)
            assert {each["deaths"] for each in told.values()} == {0}
            replicas(client, 3, 3)
            until_ready(client, *NAMES)
            assert len(nodes_of(gateway)) == 5, "two more have been placed, where the first two were"
            assert len(set(nodes_of(gateway))) == 3
    finally:
        ends.set()
        gateway.close()
        for name in ("first", "second", "third"):
            cluster.remove(name)
