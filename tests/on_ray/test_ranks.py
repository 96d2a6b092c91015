"""An engine whose ranks are on several nodes of a real Ray cluster, in a placement group."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker

from engines.messages import Hello, Load, LoadFailed
from engines.on_ray.place import Introduction
from tests.gateway.conftest import KEY
from tests.megatron.test_gateway import ADAM, MODEL, datum
from tests.on_ray.cluster import RayCluster
from tests.on_ray.standing_in import PATIENCE_S, refused, start
from tests.on_ray.test_placing import descendants
from tests.ranks.test_ranks import listening
from tests.served import ServedGateway
from tests.threads import beside

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # The SDK warns of its own deprecations, and leaves the connections of its background loops to the collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

STEPS = 6
TRAINER: dict[str, Any] = {
    "name": "trainer",
    "plugin": "megatron",
    "base_model": MODEL,
    "roles": ["train"],
    "options": {"device": "cpu", "tensor": 2},
}


@pytest.fixture(scope="module")
def two_nodes(cluster: RayCluster) -> Iterator[RayCluster]:
    """With room for one rank each."""
    for name in ("first", "second"):
        cluster.add(name, num_cpus=1)
    yield cluster


def places(gateway: ServedGateway) -> list[list[str]]:
    """The nodes of each start, by rank."""
    told = re.findall(r"it runs on (.*) in the Ray cluster", gateway.log.read_text())
    return [re.findall(r"([0-9a-f]{20,}) ", line) for line in told]


def ranks(cluster: RayCluster) -> list[int]:
    """Their processes, when both are there."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(cluster.pid)}
    found = [pid for pid, said in commands.items() if b"--meet" in said]
    assert len(found) == 2
    return found


def train(gateway: ServedGateway, meanwhile: Callable[[], None]) -> tuple[list[float], dict[str, bytes]]:
    """The losses of a run and the files of its state; something happens in the middle of it."""
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        passes, steps = [], []
        happening = None
        for step in range(STEPS):
            passes.append(client.forward_backward([datum(step % 3), datum(step % 2)], "cross_entropy"))
            steps.append(client.optim_step(ADAM))
            if step == STEPS // 2:
                passes[-1].result()
                happening = beside(meanwhile)
        losses = [future.result().metrics["loss:sum"] for future in passes]
        assert happening is not None
        happening.result(PATIENCE_S)
        client.save_state("end").result()
    saved = (gateway.data_dir / "storage" / "checkpoints").glob("[!.]*")
    [folder] = [path for path in saved if (path / "optimizer.safetensors").exists()]
    return losses, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_nodes_train_what_two_ranks_here_train_and_a_lost_node_changes_no_number(
    two_nodes: RayCluster, tmp_path: Path
) -> None:
    """A node is killed in the middle of the run; the group is whole again when another one has come."""
    slowly = {"engine_silence_s": "60", "engine_owner_timeout_s": "10"}
    here = ServedGateway(tmp_path / "here", [TRAINER], **slowly)
    try:
        here.start(PATIENCE_S)
        expected = train(here, lambda: None)
    finally:
        here.close()
    place = {"address": two_nodes.address, "ranks": 2, "wait_s": PATIENCE_S}
    gateway = ServedGateway(tmp_path / "there", [{**TRAINER, "ray": place}], **slowly)

    def lose_a_node() -> None:
        two_nodes.remove("first")
        two_nodes.add("third", num_cpus=1)

    try:
        gateway.start(PATIENCE_S)
        node = bytes(reversed(socket.inet_aton(two_nodes.address.partition(":")[0]))).hex().upper()
        for process in ranks(two_nodes):
            addresses = listening(process)
            assert addresses and {address.partition(":")[0] for address in addresses} == {node}
        assert train(gateway, lose_a_node) == expected
        before, *_, after = places(gateway)
        assert len(set(before)) == len(set(after)) == 2, "a rank on each node"
        assert len({*before, *after}) == 3
        assert gateway.stop() == 0
    finally:
        gateway.close()
        two_nodes.add("first", num_cpus=1)
        two_nodes.remove("third")


def test_ranks_on_one_node_have_numbers_in_a_row() -> None:
    from engines.on_ray.placing import Rank, neighbours  # late: it needs Ray

    here = Introduction(b"", "host", storage=True, python="python")
    placed = [Rank(number, node, here) for number, node in enumerate("bacabc")]
    assert [(rank.actor, rank.node_id) for rank in neighbours(placed)] == [
        (0, "b"), (4, "b"), (1, "a"), (3, "a"), (2, "c"), (5, "c"),
    ]  # fmt: skip


def test_ranks_for_which_there_is_no_room(two_nodes: RayCluster, tmp_path: Path) -> None:
    failed = refused(tmp_path, address=two_nodes.address, ranks=5, plugin="megatron")
    assert not failed.final
    wanted = rf"cluster at {two_nodes.address} has room for [23] of 5 ranks with CPU 1 each"  # as it learns of a loss
    assert re.search(wanted, failed.message), failed.message


def test_an_engine_of_one_process_takes_no_ranks(two_nodes: RayCluster, tmp_path: Path) -> None:
    with start(tmp_path, address=two_nodes.address, ranks=2, plugin="fake", wait_s=PATIENCE_S) as owner:
        owner.receive(Hello, PATIENCE_S)
        owner.send(Load(owner.config))
        failed = owner.receive(LoadFailed, PATIENCE_S)
        assert failed.final
        assert "ray.ranks is 2, but an engine of the plugin fake is one process" in failed.message
        assert owner.process.wait(PATIENCE_S) == 1
