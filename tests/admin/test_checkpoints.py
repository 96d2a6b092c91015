"""One checkpoint: described, deleted."""

from __future__ import annotations

from pathlib import Path

import httpx

from engines.storage import FolderStorage
from tests.admin.conftest import Place, items, keys_command, save
from tests.gateway.conftest import begin_run, outcome


def route_of(path: str) -> str:
    return "/admin/v1/checkpoints/" + path.removeprefix("tinker://")


def stored(place: Place) -> set[Path]:
    """The folders of checkpoints that are on disk."""
    return {file.parent for file in place.gateway.data_dir.glob("storage/checkpoints/*/*.safetensors")}


def test_a_checkpoint_is_described(place: Place, alice: httpx.Client) -> None:
    described = alice.get(route_of(place.paths["alice"][0])).json()
    assert described["path"] == place.paths["alice"][0]
    assert (described["kind"], described["name"], described["has_optimizer"]) == ("weights", "w0", True)
    assert (described["public"], described["expires_at"]) == (False, None)
    sampler = alice.get(route_of(place.paths["alice"][1])).json()
    assert (sampler["kind"], sampler["has_optimizer"]) == ("sampler_weights", False)
    sizes = {FolderStorage.size(folder) for folder in stored(place)}
    assert {described["size_bytes"], sampler["size_bytes"]} <= sizes


def test_a_deleted_checkpoint_is_gone_with_its_files(place: Place, carol: httpx.Client) -> None:
    before = stored(place)
    run_id = begin_run(carol, seed=77)
    path = save(carol, run_id, 1, "short-lived")
    [folder] = stored(place) - before
    assert carol.delete(route_of(path)).status_code == 204
    assert not folder.exists()
    assert carol.get(route_of(path)).status_code == carol.delete(route_of(path)).status_code == 404
    assert path not in [row["path"] for row in items(carol, "checkpoints")]
    assert save(carol, run_id, 2, "short-lived") == path  # the name is free again


def test_a_checkpoint_that_a_run_began_at_keeps_its_files(place: Place, carol: httpx.Client) -> None:
    before = stored(place)
    path = save(carol, begin_run(carol, seed=78), 1, "origin")
    [folder] = stored(place) - before
    session = carol.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model", "lora_config": {"rank": 4}}
    run_id = carol.post("/api/v1/create_model", json=body).json()["model_id"]
    load = {"model_id": run_id, "path": path, "optimizer": True, "seq_id": 1}
    answer = carol.post("/api/v1/load_weights", json=load)
    assert answer.status_code == 200, answer.text
    assert "error" not in outcome(carol, answer.json()["request_id"])
    assert carol.delete(route_of(path)).status_code == 204
    assert carol.get(route_of(path)).status_code == 404
    assert folder.exists()


def test_an_admin_deletes_what_is_anothers(carol: httpx.Client, root: httpx.Client) -> None:
    path = save(carol, begin_run(carol, seed=79), 1, "carols")
    assert root.delete(route_of(path)).status_code == 204
    assert carol.get(route_of(path)).status_code == 404


def test_an_unknown_kind_is_refused(place: Place, alice: httpx.Client) -> None:
    refused = alice.get(route_of(place.paths["alice"][0]).replace("/weights/", "/training/"))
    assert refused.status_code in (404, 422)
    assert "kind" in refused.text


def test_a_key_counts_at_once_and_until_it_is_removed(place: Place) -> None:
    key = keys_command(place.settings, "add", "dave").split()[0]
    url = f"{place.gateway.url}/admin/v1/runs"

    def status_becomes(wanted: int) -> bool:
        return any(
            httpx.get(url, headers={"X-API-Key": key}, trust_env=False).status_code == wanted
            for _ in range(2000)
        )

    assert status_becomes(200)
    listed = keys_command(place.settings, "list")
    assert key not in listed
    [line] = [line for line in listed.splitlines() if "dave" in line]
    keys_command(place.settings, "remove", line.split()[0])
    assert status_becomes(401)
