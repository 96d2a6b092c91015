"""Stored bytes have a limit for each owner: what would go beyond it is refused, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.admin.conftest import finish, keys_command, save
from tests.checkpoints.conftest import Place, route_of, trained_run
from tests.checkpoints.test_imports import send, tar_of, tensors
from tests.gateway.conftest import outcome
from tests.served import ServedGateway


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A gateway where one checkpoint uses up all that an owner may have."""
    data = tmp_path_factory.mktemp("small")
    keys = {
        owner: keys_command({"data_dir": str(data)}, "add", owner).split()[0]
        for owner in ("alice", "bob", "carol")
    }
    gateway = ServedGateway(data, None, max_checkpoint_bytes="1")
    gateway.start()
    yield Place(gateway, keys)
    gateway.close()


def saved_again(http: httpx.Client, run_id: str, seq_id: int, name: str, **more: Any) -> dict[str, Any]:
    body = {"model_id": run_id, "path": name, "seq_id": seq_id, **more}
    answer = http.post("/api/v1/save_weights", json=body)
    assert answer.status_code == 200, answer.text
    return outcome(http, answer.json()["request_id"])


def test_an_owner_whose_bytes_are_used_up_saves_copies_and_imports_nothing_more(small: Place) -> None:
    with small.client("alice") as alice, small.client("bob") as bob:
        run_id, other = trained_run(alice), trained_run(bob)
        path = save(alice, run_id, 3, "first")
        refused = saved_again(alice, run_id, 4, "second")
        assert refused["category"] == "user"
        assert "and an owner's may have 1 (setting max_checkpoint_bytes)" in refused["error"]
        copy = {"source_path": path, "destination_project_id": "p"}
        for answer in (alice.post("/api/v1/copy_weights", json=copy), send(alice, tar_of(tensors()))):
            assert (answer.status_code, "max_checkpoint_bytes" in answer.text) == (400, True)
        assert "max_checkpoint_bytes" in saved_without_a_name(alice, run_id, 5)["error"]
        assert saved_again(alice, run_id, 6, "first", overwrite=True)["path"] == path  # which takes no more
        assert "error" in saved_again(alice, run_id, 7, "third", overwrite=True)
        save(bob, other, 3, "first")  # has a limit of his own
        assert alice.delete(route_of(path)).status_code == 200
        assert "path" in saved_again(alice, run_id, 8, "second")


def saved_without_a_name(http: httpx.Client, run_id: str, seq_id: int) -> dict[str, Any]:
    body = {"model_id": run_id, "sampling_session_seq_id": seq_id, "seq_id": seq_id}
    return outcome(http, http.post("/api/v1/save_weights_for_sampler", json=body).json()["request_id"])


def test_weights_without_a_name_use_up_bytes_too(small: Place) -> None:
    with small.client("carol") as carol:
        run_id = trained_run(carol)
        assert "sampling_session_id" in saved_without_a_name(carol, run_id, 3)
        refused = saved_without_a_name(carol, run_id, 4)
        assert refused["category"] == "user"
        assert "weights that samplers have without one" in refused["error"]
        assert "max_checkpoint_bytes" in saved_again(carol, run_id, 5, "named")["error"]


def test_what_has_been_answered_is_answered_again(small: Place) -> None:
    with small.client("alice") as alice, small.client("bob") as bob:
        run_id = trained_run(bob)
        for row in bob.get("/api/v1/checkpoints").json()["checkpoints"]:
            bob.delete(route_of(row["tinker_path"]))
        path = save(bob, run_id, 3, "shared")
        assert bob.post(route_of(path, "/publish")).status_code == 200
        for row in alice.get("/api/v1/checkpoints").json()["checkpoints"]:
            alice.delete(route_of(row["tinker_path"]))
        session = alice.post("/api/v1/create_session", json={"tags": [], "sdk_version": "0.38.0"}).json()
        copy = {"source_path": path, "session_id": session["session_id"], "model_seq_id": 5}
        first, again = [alice.post("/api/v1/copy_weights", json=copy) for _ in range(2)]
        assert (first.status_code, again.status_code) == (200, 200), again.text
        assert first.json() == again.json()
        bob.delete(route_of(path))
        body = {"model_id": run_id, "sampling_session_seq_id": 1, "seq_id": 4}
        sampler = finish(bob, bob.post("/api/v1/save_weights_for_sampler", json=body))["sampling_session_id"]
        for _ in range(2):  # the second time it uses up all already
            promoted = bob.post(f"/admin/v1/samplers/{sampler}/promote", json={"name": "best"})
            assert promoted.status_code == 201, promoted.text
        other = bob.post(f"/admin/v1/samplers/{sampler}/promote", json={"name": "better"})
        assert (other.status_code, "max_checkpoint_bytes" in other.text) == (400, True)
