"""A gateway with keys of three owners and an admin, with some work done, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import begin_run, outcome, send_pass, send_step
from tests.postgres import PostgresServer
from tests.served import ServedGateway

RUNS = {"alice": 5, "bob": 2}
"""How many runs these owners have; each run but the last of an owner has two checkpoints. Nobody changes them."""


@dataclass(frozen=True)
class Place:
    """A running gateway, its keys, and the ids of what each owner has there, oldest first."""

    gateway: ServedGateway
    keys: dict[str, str]
    runs: dict[str, list[str]]
    paths: dict[str, list[str]]
    settings: dict[str, str]

    def client(self, who: str) -> httpx.Client:
        """A client with the key of `alice`, `bob`, `carol`, or `root`, who is an admin."""
        headers = {"X-API-Key": self.keys[who]}
        return httpx.Client(base_url=self.gateway.url, headers=headers, timeout=60, trust_env=False)


def keys_command(settings: dict[str, str], *arguments: str) -> str:
    """What `python -m gateway.keys` prints, run as an operator does, beside the gateway."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    environment |= {f"TANDEM_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "gateway.keys", *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def finish(http: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    """The outcome of an accepted call, which must have succeeded."""
    assert response.status_code == 200, response.text
    result = outcome(http, response.json()["request_id"])
    assert "error" not in result, result
    return result


def save(http: httpx.Client, run_id: str, seq_id: int, name: str, kind: str = "weights") -> str:
    """A checkpoint; its path."""
    route = "save_weights" if kind == "weights" else "save_weights_for_sampler"
    body = {"model_id": run_id, "path": name, "seq_id": seq_id}
    return str(finish(http, http.post(f"/api/v1/{route}", json=body))["path"])


def work(http: httpx.Client, count: int) -> tuple[list[str], list[str]]:
    """Some runs with a step each; all but the last are saved, to train on and to sample from."""
    runs: list[str] = []
    paths: list[str] = []
    for number in range(count):
        run_id = begin_run(http, rank=4 + 4 * (number % 2), seed=number)
        finish(http, send_pass(http, run_id, 1, [1, 2, 3, 4 + number]))
        finish(http, send_step(http, run_id, 2))
        runs.append(run_id)
        if number < count - 1:
            paths.append(save(http, run_id, 3, f"w{number}"))
            paths.append(save(http, run_id, 4, f"s{number}", "sampler_weights"))
    return runs, paths


@pytest.fixture(scope="package", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The gateway, with the work done."""
    data = tmp_path_factory.mktemp("admin")
    settings = {"data_dir": str(data)}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    owners = {"alice": [], "bob": [], "carol": [], "root": ["--admin"]}
    keys = {owner: keys_command(settings, "add", owner, *flags).split()[0] for owner, flags in owners.items()}
    gateway = ServedGateway(
        data, None, **{name: text for name, text in settings.items() if name != "data_dir"}
    )
    gateway.start()
    place = Place(gateway, keys, {}, {}, settings)
    for owner, count in RUNS.items():
        with place.client(owner) as http:
            place.runs[owner], place.paths[owner] = work(http, count)
    yield place
    gateway.stop()


@pytest.fixture
def alice(place: Place) -> Iterator[httpx.Client]:
    """An owner."""
    with place.client("alice") as http:
        yield http


@pytest.fixture
def bob(place: Place) -> Iterator[httpx.Client]:
    """Another owner."""
    with place.client("bob") as http:
        yield http


@pytest.fixture
def carol(place: Place) -> Iterator[httpx.Client]:
    """The owner whose things tests make and delete."""
    with place.client("carol") as http:
        yield http


@pytest.fixture
def root(place: Place) -> Iterator[httpx.Client]:
    """An admin, who has nothing of their own."""
    with place.client("root") as http:
        yield http


def items(http: httpx.Client, route: str, **where: Any) -> list[dict[str, Any]]:
    """A list in one page."""
    response = http.get(f"/admin/v1/{route}", params={"limit": 1000, **where})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["next_cursor"] is None
    found: list[dict[str, Any]] = body["items"]
    return found
