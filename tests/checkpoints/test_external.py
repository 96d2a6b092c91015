"""External weights: files behind signed addresses, plain or encrypted with age; and the official command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyrage
import pytest
import tinker

from tests.admin.conftest import save
from tests.checkpoints.conftest import Place, route_of, trained_run
from tests.checkpoints.keys import SSH_PRIVATE, SSH_PUBLIC
from tests.gateway.conftest import outcome
from tests.official import COMMAND_LINE

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
IDENTITY = pyrage.x25519.Identity.generate()
STRANGER = pyrage.x25519.Identity.generate()


def export(http: httpx.Client, run_id: str, seq_id: int, name: str, **more: Any) -> dict[str, Any]:
    body = {"model_id": run_id, "path": name, "seq_id": seq_id, **more}
    answer = http.post("/api/v1/save_weights_external", json=body)
    assert answer.status_code == 200, answer.text
    return outcome(http, answer.json()["request_id"])


def urls_of(http: httpx.Client, path: str) -> dict[str, Any]:
    answer = http.get(route_of(path, "/external_weights_urls"))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def fetch(url: str) -> bytes:
    """As the official command line does it: no headers, and Content-Length is the size that it reports."""
    with urllib.request.urlopen(url, timeout=60) as response:
        body: bytes = response.read()
        assert int(response.headers["Content-Length"]) == len(body)
        return body


def test_the_files_come_as_they_were_saved(place: Place, alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    before = place.folders()
    save(alice, run_id, 3, "same", "sampler_weights")
    [saved] = place.folders() - before
    result = export(alice, run_id, 4, "files")
    path = f"tinker://{run_id}/external_weights/files"
    assert result["path"] == path
    assert result["type"] == "save_weights_external"
    answer = urls_of(alice, path)
    assert sorted(answer["urls"]) == ADAPTER
    expires = datetime.fromisoformat(answer["expires"])
    assert timedelta(minutes=55) < expires - datetime.now(UTC) <= timedelta(hours=1)
    fetched = {name: fetch(url) for name, url in answer["urls"].items()}
    assert fetched == {name: (saved / name).read_bytes() for name in ADAPTER}
    assert result["size_bytes"] == sum(len(body) for body in fetched.values())


def test_encrypted_files_open_for_their_recipients_only(place: Place, alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    before = place.folders()
    save(alice, run_id, 3, "same", "sampler_weights")
    [saved] = place.folders() - before
    recipients = [str(IDENTITY.to_public()), SSH_PUBLIC]
    result = export(alice, run_id, 4, "sealed", age_encryption_recipients=recipients)
    answer = urls_of(alice, result["path"])
    assert sorted(answer["urls"]) == [f"{name}.age" for name in ADAPTER]
    sealed = {name: fetch(answer["urls"][f"{name}.age"]) for name in ADAPTER}
    for name, body in sealed.items():
        assert body.startswith(b"age-encryption.org/v1\n")
        expected = (saved / name).read_bytes()
        assert pyrage.decrypt(body, [IDENTITY]) == expected
        assert pyrage.decrypt(body, [pyrage.ssh.Identity.from_buffer(SSH_PRIVATE)]) == expected
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(body, [STRANGER])
    assert result["size_bytes"] == sum(len(body) for body in sealed.values())
    [listed] = [
        row
        for row in alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()["checkpoints"]
        if row["checkpoint_type"] == "external"
    ]
    assert listed["size_bytes"] == result["size_bytes"]
    [folder] = place.folders() - before - {saved}  # nothing that is not encrypted is left
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.age" for name in ADAPTER]


def test_a_run_goes_on_while_its_neighbours_files_are_encrypted(alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    recipients = [str(IDENTITY.to_public())]
    for seq_id in (3, 4, 5):
        assert "error" not in export(
            alice, run_id, seq_id, f"n{seq_id}", age_encryption_recipients=recipients
        )
    assert save(alice, run_id, 6, "after").endswith("/weights/after")


@pytest.mark.parametrize(
    ("recipients", "named"),
    [
        ([], "0 recipients"),
        ([str(IDENTITY.to_public())] * 11, "11 recipients"),
        (["age1notakey"], "recipients[0]"),
        ([str(IDENTITY.to_public()), "ssh-ed25519 AAAA"], "recipients[1]"),
        (["age1pq1" + "q" * 1000], "recipients[0]"),
    ],
)
def test_recipients_that_are_none_are_named(alice: httpx.Client, recipients: list[str], named: str) -> None:
    run_id = trained_run(alice)
    failed = export(alice, run_id, 3, "x", age_encryption_recipients=recipients)
    assert failed["category"] == "user"
    assert named in failed["error"]
    assert alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()["checkpoints"] == []
    assert "error" not in export(alice, run_id, 4, "x")  # the run goes on


def test_a_taken_name_fails_and_leaves_no_files(place: Place, alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    assert "error" not in export(alice, run_id, 3, "x")
    before = place.folders()
    for seq_id, more in ((4, {}), (5, {"age_encryption_recipients": [str(IDENTITY.to_public())]})):
        failed = export(alice, run_id, seq_id, "x", **more)
        assert "exists already" in failed["error"]
        assert "overwrite" not in failed["error"]
    assert _soon_equal(place, before)


def _soon_equal(place: Place, wanted: set[Path]) -> bool:
    deadline = time.monotonic() + 10
    while place.folders() != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return place.folders() == wanted


def test_external_weights_are_for_downloading_only(alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    path = export(alice, run_id, 3, "x")["path"]
    session = alice.post("/api/v1/create_session", json={}).json()["session_id"]
    begin = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    copy = {"source_path": path, "destination_project_id": "p"}
    for route, body in (
        ("load_weights", begin),
        ("create_sampling_session", sampler),
        ("copy_weights", copy),
    ):
        answer = alice.post(f"/api/v1/{route}", json=body)
        assert answer.status_code == 400, answer.text
        assert "downloading" in answer.json()["detail"]
    load = {"model_id": run_id, "seq_id": 4, "path": path, "optimizer": False}
    failed = outcome(alice, alice.post("/api/v1/load_weights", json=load).json()["request_id"])
    assert "downloading" in failed["error"]
    info = alice.post("/api/v1/weights_info", json={"tinker_path": path}).json()
    assert (info["base_model"], info["lora_rank"]) == ("fake/model", 4)


def test_only_external_weights_have_addresses_of_their_files(alice: httpx.Client, bob: httpx.Client) -> None:
    run_id = trained_run(alice)
    refused = alice.get(route_of(save(alice, run_id, 3, "w"), "/external_weights_urls"))
    assert (refused.status_code, "save_weights_external" in refused.text) == (400, True)
    path = export(alice, run_id, 4, "x")["path"]
    assert bob.get(route_of(path, "/external_weights_urls")).status_code == 404
    assert bob.put(route_of(path, "/ttl"), json={"ttl_seconds": None}).status_code == 404
    assert bob.delete(route_of(path)).status_code == 404


def test_addresses_are_renewed_and_end_with_the_weights(alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    path = export(alice, run_id, 3, "x", ttl_seconds=3600)["path"]
    url = urls_of(alice, path)["urls"][ADAPTER[0]]
    assert alice.put(route_of(path, "/ttl"), json={"ttl_seconds": 7200}).status_code == 200
    assert alice.put(route_of(path, "/ttl"), json={"ttl_seconds": None}).status_code == 200
    assert fetch(url) == fetch(urls_of(alice, path)["urls"][ADAPTER[0]])
    assert alice.delete(route_of(path)).status_code == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(url)
    assert alice.get(route_of(path, "/external_weights_urls")).status_code == 404


@pytest.mark.parametrize(
    ("version", "shown"),
    [(None, True), ("0.30.4", True), ("0.38.0", True), ("1.0.0", True), ("0.29.1", False), ("0.1.0", False)],
)
def test_sdks_that_do_not_know_the_kind_do_not_see_it(
    alice: httpx.Client, version: str | None, shown: bool
) -> None:
    """One row of an unknown type breaks the whole list there; the count is of what is shown."""
    run_id = trained_run(alice)
    external = export(alice, run_id, 3, "x")["path"]
    known = save(alice, run_id, 4, "w")
    headers = {} if version is None else {"X-Stainless-Package-Version": version}
    of_run = alice.get(f"/api/v1/training_runs/{run_id}/checkpoints", headers=headers).json()["checkpoints"]
    assert [row["tinker_path"] for row in of_run] == [known, external][: 1 + shown]
    own = alice.get("/api/v1/checkpoints?limit=1000", headers=headers).json()
    assert own["cursor"]["total_count"] == len(own["checkpoints"])
    assert (external in [row["tinker_path"] for row in own["checkpoints"]]) == shown


# ------------------------------------------------------------------ the official client and its command line

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_the_official_sdk_exports_and_finds_the_files(place: Place) -> None:
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=3).result()
        path = client.save_weights_external("final", ttl_seconds=3600).result().path
        rest = service.create_rest_client()
        answer = rest.get_external_weights_urls(path).result()
        assert sorted(answer.urls) == ADAPTER
        assert answer.expires.tzinfo is not None
        assert json.loads(fetch(answer.urls["adapter_config.json"]))["r"] == 4
        [row] = rest.list_checkpoints(client.model_id).result().checkpoints
        assert (row.checkpoint_type, row.checkpoint_id) == ("external", "external_weights/final")
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert rest.list_checkpoints(client.model_id).result().checkpoints == []


def command_line(
    place: Place, *arguments: str, program: str = COMMAND_LINE
) -> subprocess.CompletedProcess[str]:
    """The official `tinker` command in a process of its own."""
    environment = {
        **os.environ,
        "TINKER_BASE_URL": place.url,
        "TINKER_API_KEY": place.keys["alice"],
        "TINKER_TELEMETRY": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_the_official_command_downloads_checkpoints(
    place: Place, alice: httpx.Client, tmp_path: Path
) -> None:
    run_id = trained_run(alice)
    before = place.folders()
    training = save(alice, run_id, 3, "w")
    [saved] = place.folders() - before
    external = export(alice, run_id, 4, "x")["path"]
    kept = len(alice.get("/api/v1/checkpoints?limit=1000").json()["checkpoints"])
    for path in (training, external):
        done = command_line(place, "checkpoint", "download", path, "--output", str(tmp_path))
        assert done.returncode == 0, done.stderr + done.stdout
        target = tmp_path / path.removeprefix("tinker://").replace("/", "_")
        assert sorted(each.name for each in target.iterdir()) == ADAPTER
        for name in ADAPTER:
            assert (target / name).read_bytes() == (saved / name).read_bytes()
    # the temporary export is gone again
    assert len(alice.get("/api/v1/checkpoints?limit=1000").json()["checkpoints"]) == kept


def test_the_official_command_changes_checkpoints(place: Place, alice: httpx.Client) -> None:
    path = save(alice, trained_run(alice), 3, "w")
    for arguments in (
        ("publish", path),
        ("publish", path),
        ("set-ttl", path, "--ttl", "7200"),
        ("set-ttl", path, "--remove"),
        ("unpublish", path),
        ("unpublish", path),
        ("info", path),
        ("delete", path, "--yes"),
    ):
        done = command_line(place, "checkpoint", *arguments)
        assert done.returncode == 0, (arguments, done.stderr + done.stdout)
    assert alice.get(route_of(path, "/archive")).status_code == 404


HUB = """
import sys, huggingface_hub
from pathlib import Path

class Hub:  # stands in for the hub only; everything else is the official command's own
    def whoami(self): return {"name": "me"}
    def create_repo(self, **wanted): print("repo", wanted["repo_id"])
    def upload_folder(self, *, folder_path, **wanted):
        for path in sorted(Path(folder_path).iterdir()): print("file", path.name, path.stat().st_size)

def nothing_there(**wanted): raise OSError("no such file on the hub")

huggingface_hub.HfApi, huggingface_hub.hf_hub_download = Hub, nothing_there
"""


def test_the_official_command_pushes_to_the_hub(place: Place, alice: httpx.Client) -> None:
    path = save(alice, trained_run(alice), 3, "w")
    done = command_line(
        place, "checkpoint", "push-hf", path, "--repo", "me/adapter", program=HUB + COMMAND_LINE
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "repo me/adapter" in done.stdout
    uploaded = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("file ")]
    assert uploaded == ["README.md", *ADAPTER]
