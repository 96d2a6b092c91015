"""`tandem checkpoints prune` and `import`, `tandem samplers`: what they print, what they do, how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdk import AdminClient
from tests.admin.conftest import save
from tests.gateway.conftest import begin_run, outcome
from tests.sdk.conftest import Place
from tests.sdk.test_cli import lines_of, tandem


@pytest.fixture
def http(place: Place) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=place.url, headers={"X-API-Key": "tml-x"}, timeout=60, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def saved(http: httpx.Client) -> tuple[str, list[str]]:
    """A run of its own with three checkpoints, oldest first."""
    run_id = begin_run(http)
    return run_id, [save(http, run_id, 1 + number, f"n{number}") for number in range(3)]


def left(place: Place, run_id: str) -> list[str]:
    with AdminClient(place.url) as admin:
        return [each.path for each in admin.checkpoints(run_id=run_id)][::-1]


def test_pruning_says_what_and_asks(place: Place, saved: tuple[str, list[str]]) -> None:
    run_id, paths = saved
    shown = tandem(place, "checkpoints", "prune", "--run", run_id, "--keep-last", "1", "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout == ""
    assert [line for line in shown.stderr.splitlines() if line.startswith("tinker://")] == paths[:2]
    assert "2 would be deleted" in shown.stderr
    declined = tandem(place, "checkpoints", "prune", "--run", run_id, "--keep-last", "1", input="n\n")
    assert declined.exit_code == 1
    assert left(place, run_id) == paths
    done = tandem(place, "checkpoints", "prune", "--run", run_id, "--keep-last", "1", input="y\n")
    assert done.exit_code == 0
    assert "2 deleted" in done.stderr
    assert left(place, run_id) == paths[2:]
    again = tandem(place, "checkpoints", "prune", "--run", run_id, "--keep-last", "1")
    assert again.exit_code == 0
    assert "0 deleted" in again.stderr


def test_pruning_for_programs_and_by_time(place: Place, saved: tuple[str, list[str]]) -> None:
    run_id, paths = saved
    none = tandem(place, "checkpoints", "prune", "--run", run_id, "--before", "2020-01-31", "-y", "--json")
    assert json.loads(none.stdout) == {"dry_run": True, "paths": [], "size_bytes": 0, "more": False}
    done = tandem(place, "checkpoints", "prune", "--run", run_id, "--prefix", "n1", "--yes", "--json")
    answer = json.loads(done.stdout)
    assert (answer["paths"], answer["dry_run"]) == ([paths[1]], False)
    assert left(place, run_id) == [paths[0], paths[2]]


def test_pruning_without_a_condition_is_refused(place: Place, saved: tuple[str, list[str]]) -> None:
    run_id, paths = saved
    refused = tandem(place, "checkpoints", "prune", "--yes")
    assert refused.exit_code == 1
    assert "at least one of" in refused.stderr
    wrong = tandem(place, "checkpoints", "prune", "--before", "yesterday")
    assert wrong.exit_code == 2
    assert left(place, run_id) == paths


def adapter(folder: Path, **config: object) -> Path:
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((2, 16), np.float32), name.format("B"): np.ones((16, 2), np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_a_folder_is_imported(place: Place, tmp_path: Path) -> None:
    folder = str(adapter(tmp_path))
    done = tandem(place, "checkpoints", "import", folder, "--model", "fake/model", "--name", "mine")
    [path] = lines_of(done)
    assert path.endswith("/weights/mine")
    assert "rank 2, alpha 6, 1 layers." in done.stderr
    [line] = [line for line in lines_of(tandem(place, "checkpoints", "--all")) if line.startswith(path)]
    assert "fake/model" in line
    run_id = path.removeprefix("tinker://").split("/")[0]
    assert [line for line in lines_of(tandem(place, "runs", "--status", "storage")) if run_id in line]
    as_json = tandem(
        place,
        "checkpoints",
        "import",
        folder,
        "--model",
        "fake/model",
        "--name",
        "m",
        "--ttl",
        "3600",
        "--json",
    )
    made = json.loads(as_json.stdout)
    assert (made["layers"], made["zero_layers"]) == (1, 0)
    assert made["checkpoint"]["expires_at"] is not None
    assert tandem(place, "checkpoints", "delete", path, made["checkpoint"]["path"], "-y").exit_code == 0


def test_what_is_no_adapter_is_said(place: Place, tmp_path: Path) -> None:
    arguments = ["--model", "fake/model", "--name", "mine"]
    empty = tandem(place, "checkpoints", "import", str(tmp_path), *arguments)
    assert "cannot be read" in empty.stderr
    refused = tandem(place, "checkpoints", "import", str(adapter(tmp_path, use_dora=True)), *arguments)
    assert refused.exit_code == 1
    assert "use_dora" in refused.stderr


def test_samplers_are_listed_and_promoted(place: Place, http: httpx.Client) -> None:
    run_id = begin_run(http)
    body = {"model_id": run_id, "seq_id": 1, "sampling_session_seq_id": 0}
    promise = http.post("/api/v1/save_weights_for_sampler", json=body).json()
    sampler_id = outcome(http, promise["request_id"])["sampling_session_id"]
    head, line = lines_of(tandem(place, "samplers", "--run", run_id))
    assert head.split() == ["sampler", "model", "weights", "made"]
    assert line.startswith(sampler_id)
    assert f"of {run_id}, unnamed" in line
    done = tandem(place, "samplers", "promote", sampler_id, "best")
    assert f"tinker://{run_id}/sampler_weights/best" in done.stdout
    as_json = tandem(place, "samplers", "promote", sampler_id, "second", "--json")
    assert json.loads(as_json.stdout)["name"] == "second"
    assert tandem(place, "samplers", "promote", "none", "best").exit_code == 1
    assert tandem(place, "samplers", "--run", run_id, "promote", sampler_id, "x").exit_code == 2
    for name in ("best", "second"):
        path = f"tinker://{run_id}/sampler_weights/{name}"
        assert tandem(place, "checkpoints", "delete", path, "-y").exit_code == 0
