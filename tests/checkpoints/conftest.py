"""A gateway with keys of two owners and an admin, on both databases, for everything around saved weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.admin.conftest import finish, keys_command
from tests.gateway.conftest import begin_run, send_pass, send_step
from tests.postgres import PostgresServer
from tests.served import ServedGateway


@dataclass(frozen=True)
class Place:
    """A running gateway and its keys; what is in it belongs to the test that made it."""

    gateway: ServedGateway
    keys: dict[str, str]

    @property
    def url(self) -> str:
        return self.gateway.url

    def client(self, who: str) -> httpx.Client:
        """A client with the key of `alice`, `bob`, or `root`, who is an admin."""
        headers = {"X-API-Key": self.keys[who]}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def folders(self) -> set[Path]:
        """The stored folders, those under way too."""
        return set(self.gateway.data_dir.glob("storage/checkpoints/*"))


@pytest.fixture(scope="package", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data = tmp_path_factory.mktemp("checkpoints")
    settings = {"data_dir": str(data), "max_import_bytes": "4000000"}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    flags = {"alice": [], "bob": [], "root": ["--admin"]}
    keys = {owner: keys_command(settings, "add", owner, *more).split()[0] for owner, more in flags.items()}
    del settings["data_dir"]
    gateway = ServedGateway(data, None, **settings)
    gateway.start()
    yield Place(gateway, keys)
    gateway.stop()
    gateway.close()


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
def root(place: Place) -> Iterator[httpx.Client]:
    """An admin."""
    with place.client("root") as http:
        yield http


@pytest.fixture
def anybody(place: Place) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=place.url, timeout=60, trust_env=False) as http:
        yield http


def trained_run(http: httpx.Client, rank: int = 4) -> str:
    """A run with one step behind it; its next number is 3."""
    run_id = begin_run(http, rank=rank)
    finish(http, send_pass(http, run_id, 1, [1, 2, 3, 4, 5]))
    finish(http, send_step(http, run_id, 2))
    return run_id


def route_of(path: str, action: str = "") -> str:
    """The address of a checkpoint in the Tinker dialect."""
    run_id, rest = path.removeprefix("tinker://").split("/", 1)
    return f"/api/v1/training_runs/{run_id}/checkpoints/{rest}{action}"
