"""Finding a place: each obstacle is one sentence, and says whether waiting may help. With a real cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from engines.messages import Hello, Load, Ready, Stop
from tests.on_ray.cluster import RayCluster, token
from tests.on_ray.standing_in import PATIENCE_S, refused, start
from tests.served import free_port, has_ended

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def node(cluster: RayCluster) -> str:
    """The address of a cluster with one node."""
    cluster.add("node", num_cpus=1, resources={"nvme": 1}, labels={"pool": "a"})
    return cluster.address


def says(message: str, *words: str) -> bool:
    """Whether it is one sentence with these words in it."""
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    return True


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RAY_AUTH_MODE": ""}, ["token authentication", "RAY_AUTH_MODE=token"]),
        ({"RAY_AUTH_MODE": "disabled"}, ["token authentication", "RAY_AUTH_MODE=token"]),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, ["no token", "/nonexistent/.ray/auth_token"]),
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nonexistent/t"}, ["no token", "/nonexistent/t"]),
    ],
)
def test_nothing_is_done_without_a_token(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], words: list[str]
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    failed = refused(tmp_path, address=node)
    assert failed.final
    assert says(failed.message, *words)


def test_another_token_does_not_open_the_cluster(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token()["RAY_AUTH_TOKEN"])
    failed = refused(tmp_path, address=node)
    assert not failed.final
    assert says(failed.message, node, "token is another one")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"gpus": 1}, ["no node", "CPU 1, GPU 1", "nvme 1", "label pool=a"]),
        ({"labels": {"pool": "b"}}, ["no node", "label pool=b", "label pool=a"]),
        ({"resources": {"nvme": 2}}, ["no node", "nvme 2"]),
    ],
)
def test_what_no_node_has_is_named_beside_what_they_have(
    node: str, tmp_path: Path, wanted: dict[str, Any], words: list[str]
) -> None:
    failed = refused(tmp_path, address=node, **wanted)
    assert not failed.final, "a node that has it may come"
    assert says(failed.message, node, *words)


def test_nobody_at_the_address(variables: dict[str, str], tmp_path: Path) -> None:
    failed = refused(tmp_path, address=f"127.0.0.1:{free_port()}")
    assert not failed.final
    assert says(failed.message, "no Ray cluster answers", "Connection refused")


def test_an_interpreter_that_the_node_has_not(node: str, tmp_path: Path) -> None:
    failed = refused(tmp_path, address=node, python="/nonexistent/python", wait_s=PATIENCE_S)
    assert failed.final
    assert says(failed.message, "/nonexistent/python", os.uname().nodename)


def test_an_engine_has_its_place_until_it_ends(node: str, tmp_path: Path) -> None:
    """Meanwhile another one waits for it in vain; afterwards it is free."""
    with start(tmp_path, address=node, wait_s=PATIENCE_S) as owner:
        hello = owner.receive(Hello, PATIENCE_S)
        owner.send(Load(owner.config))
        assert owner.receive(Ready, PATIENCE_S).info.base_model == "test/bytes"
        failed = refused(tmp_path, address=node)
        assert not failed.final
        assert says(failed.message, "taken", "CPU 1", node)
        owner.send(Stop())
        assert owner.process.wait(PATIENCE_S) == 0
        assert has_ended(hello.pid)
    with start(tmp_path, address=node, wait_s=PATIENCE_S) as owner:
        owner.receive(Hello, PATIENCE_S)


def test_an_engine_ends_with_what_stands_in_for_it(node: str, tmp_path: Path) -> None:
    """However that ends."""
    with start(tmp_path, address=node, wait_s=PATIENCE_S) as owner:
        pid = owner.receive(Hello, PATIENCE_S).pid
        owner.process.kill()
        deadline = time.monotonic() + PATIENCE_S
        while not has_ended(pid):
            assert time.monotonic() < deadline, "the engine process lives on"
            time.sleep(0.05)


def test_a_cluster_of_its_own_is_started_on_demand_and_ends_with_it(
    variables: dict[str, str], tmp_path: Path
) -> None:
    with start(tmp_path, address="local", wait_s=PATIENCE_S, resources={"own": 1}) as owner:
        pid = owner.receive(Hello, PATIENCE_S).pid
        owner.send(Load(owner.config))
        owner.receive(Ready, PATIENCE_S)
        ray_below = [other for other in descendants(owner.process.pid) if other != pid]
        assert ray_below
        owner.send(Stop())
        assert owner.process.wait(PATIENCE_S) == 0
        deadline = time.monotonic() + PATIENCE_S
        while not all(has_ended(other) for other in [pid, *ray_below]):
            assert time.monotonic() < deadline, "something of the cluster lives on"
            time.sleep(0.05)


def test_a_cluster_that_wants_no_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    open_to_all = RayCluster({"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}, tmp_path / "log")
    try:
        open_to_all.add("node", num_cpus=1)
        for name, value in token().items():
            monkeypatch.setenv(name, value)
        failed = refused(tmp_path, address=open_to_all.address, wait_s=PATIENCE_S)
        assert says(
            failed.message, open_to_all.address, "without token authentication", "RAY_AUTH_MODE=token"
        )
    finally:
        open_to_all.close()


def descendants(pid: int) -> list[int]:
    """Processes below one, at any depth."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
