"""Weights that the disk has damaged: loaded by nobody, the server's fault, and found in its log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.admin.conftest import finish, save
from tests.checkpoints.conftest import Place, trained_run
from tests.gateway.conftest import begin_run, outcome, send_pass

WEIGHTS, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = [flip_a_bit, cut_short, Path.unlink]


def stored(place: Place, http: httpx.Client, kind: str = "weights") -> tuple[str, str, Path]:
    """A run, the path of a checkpoint of it, and its folder."""
    before = place.folders()
    run_id = trained_run(http)
    path = save(http, run_id, 3, "w", kind)
    [folder] = place.folders() - before
    return run_id, path, folder


def load(http: httpx.Client, run_id: str, seq_id: int, path: str, *, optimizer: bool) -> dict[str, Any]:
    body = {"model_id": run_id, "path": path, "optimizer": optimizer, "seq_id": seq_id}
    return outcome(http, http.post("/api/v1/load_weights", json=body).json()["request_id"])


def draw(http: httpx.Client, path: str, seq_id: int) -> dict[str, Any]:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    made = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    sampler = http.post("/api/v1/create_sampling_session", json=made).json()["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 2, "seed": 7},
        "num_samples": 1,
    }
    return outcome(http, http.post("/api/v1/asample", json=body).json()["request_id"])


def require_told(place: Place, failed: dict[str, Any], file: Path) -> None:
    """The failure is the server's, names the file and no folder, and has an id under which the log says where."""
    assert failed["category"] == "server", failed
    assert f"the stored weights are damaged: {file.name} is " in failed["error"]
    assert file.parent.name not in failed["error"]
    found = re.search(r"\(error id (\w+)\)", failed["error"])
    assert found is not None, failed
    [line] = [line for line in place.gateway.log.read_text().splitlines() if f"error {found[1]}:" in line]
    assert str(file) in line


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_damaged_checkpoint_is_not_loaded(
    place: Place, alice: httpx.Client, name: str, damage: Any
) -> None:
    run_id, path, folder = stored(place, alice)
    whole = (folder / name).read_bytes()
    damage(folder / name)
    require_told(place, load(alice, run_id, 4, path, optimizer=True), folder / name)
    assert "error" not in finish(alice, send_pass(alice, run_id, 5, [1, 2, 3, 4, 5]))  # the run goes on
    alone = load(alice, begin_run(alice), 1, path, optimizer=False)  # what is not wanted may be damaged
    assert ("error" in alone) == (name == WEIGHTS)
    (folder / name).write_bytes(whole)
    assert "error" not in load(alice, run_id, 6, path, optimizer=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_sampled(place: Place, alice: httpx.Client, damage: Any) -> None:
    _, path, folder = stored(place, alice)
    whole = (folder / WEIGHTS).read_bytes()
    damage(folder / WEIGHTS)
    require_told(place, draw(alice, path, 0), folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(whole)
    assert len(draw(alice, path, 0)["sequences"][0]["tokens"]) == 2


def test_an_imported_adapter_is_compared_too(place: Place, alice: httpx.Client) -> None:
    """And an archive of a checkpoint is what an import takes: the checksums are not in it."""
    run_id, path, _ = stored(place, alice, "sampler_weights")
    route = path.removeprefix("tinker://").split("/", 1)[1]
    archive = alice.get(
        f"/api/v1/training_runs/{run_id}/checkpoints/{route}/archive", follow_redirects=True
    ).content
    before = place.folders()
    wanted = {"base_model": "fake/model", "name": "mine"}
    headers = {"Content-Type": "application/x-tar"}
    made = alice.post("/admin/v1/checkpoints", params=wanted, content=archive, headers=headers)
    assert made.status_code < 300, made.text
    [folder] = place.folders() - before
    imported = made.json()["checkpoint"]["path"]
    assert "error" not in draw(alice, imported, 0)
    flip_a_bit(folder / WEIGHTS)
    require_told(place, load(alice, run_id, 4, imported, optimizer=False), folder / WEIGHTS)
