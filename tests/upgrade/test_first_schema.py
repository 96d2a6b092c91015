"""A database of the first schema, filled by the version that had it, is served by this one.

`first_schema.json` holds the tables and files of a gateway of that time (the revision before 0002), which was killed
with operations of a run, the creation of another run and a sample still open; its API key is in the notes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from sqlalchemy import JSON, Boolean, Column, Connection, MetaData, Table, insert

from gateway.migrate import alembic_config
from gateway.store.database import Database
from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.served import ServedGateway

OLD: dict[str, Any] = json.loads((Path(__file__).parent / "first_schema.json").read_text())
NOTES: dict[str, Any] = OLD["notes"]
FIRST_TOKENS = (3, 4, 5, 3, 4)
"""Of the data of the old run's steps; three are done, two are open."""
LEARNING_RATE = 0.01


@dataclass(frozen=True, slots=True)
class Installation:
    """What an operator finds: a data folder, a database of the first schema, a newer version of Tandem."""

    gateway: ServedGateway
    database_url: str
    data_dir: Path

    def migrate(self) -> None:
        """The operator's command."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")},
            "TANDEM_DATA_DIR": str(self.data_dir),
            "TANDEM_DATABASE_URL": self.database_url,
        }
        subprocess.run([sys.executable, "-m", "gateway.migrate"], env=environment, check=True, timeout=60)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    data_dir = tmp_path / "data"
    for name, content in OLD["files"].items():
        path = data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))
    settings = {}
    if request.param == "postgres":
        settings["database_url"] = request.getfixturevalue("empty_pg_url")
    url = settings.get("database_url", f"sqlite:///{data_dir / 'tandem.db'}")
    asyncio.run(_install(url))
    gateway = ServedGateway(data_dir, None, **settings)
    yield Installation(gateway, url, data_dir)
    gateway.close()


async def _install(url: str) -> None:
    database = Database(url)
    await database.alone(_fill)
    await database.close()


def _fill(connection: Connection) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "0001")
    schema = MetaData()
    schema.reflect(connection)
    assert {table.name for table in schema.sorted_tables} == {*OLD["tables"], "alembic_version"}
    age_s = time.time() - max(row["created_at"] for row in OLD["tables"]["futures"])
    for table in schema.sorted_tables:
        rows = [_row(table, row, age_s) for row in OLD["tables"].get(table.name, ())]
        if rows:
            connection.execute(insert(table), rows)


def _row(table: Table, row: dict[str, Any], age_s: float) -> dict[str, Any]:
    """A row in the types of its table, as if it had been written just now: nothing of it has expired."""
    return {name: _typed(table.c[name], value, age_s) for name, value in row.items()}


def _typed(column: Column[Any], value: Any, age_s: float) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"])
    if isinstance(column.type, JSON):
        return json.loads(value)
    if isinstance(column.type, Boolean):
        return bool(value)
    return value + age_s if column.name.endswith("_at") else value


@pytest.fixture
def expected(tmp_path: Path) -> Iterator[list[float]]:
    """Losses and norms of the same steps in a run that nobody disturbs, with this version."""
    gateway = ServedGateway(tmp_path / "new")
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            run_id = begin_run(http, rank=2, seed=1)
            promises = []
            for step, token in enumerate(FIRST_TOKENS):
                promises.append(send_pass(http, run_id, 2 * step + 1, [token, 1, 4, 1, 5, 9]).json())
                promises.append(send_step(http, run_id, 2 * step + 2, learning_rate=LEARNING_RATE).json())
            yield [_number(outcome(http, promise["request_id"])) for promise in promises]
    finally:
        gateway.close()


def _number(result: dict[str, Any]) -> float:
    """The loss of a pass, the norm of a step."""
    [value] = [
        result["metrics"][name]
        for name in ("loss:sum", "unclipped_grad_l2:mean")
        if name in result["metrics"]
    ]
    return float(value)


def test_what_was_done_is_there_and_what_was_open_is_done(
    installed: Installation, expected: list[float]
) -> None:
    if installed.database_url.startswith("postgresql"):
        with pytest.raises(RuntimeError, match="the database's schema is not this version's; run"):
            installed.gateway.start()
        installed.migrate()
    gateway = installed.gateway
    gateway.start()
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": NOTES["key"]}, timeout=60) as http:
        done = [f"{NOTES['run']}:{number}" for number in range(1, 7)]
        assert [_number(outcome(http, name)) for name in [*done, *NOTES["open"]]] == expected
        assert outcome(http, NOTES["open_run"])["type"] == "create_model"
        assert outcome(http, NOTES["open_sample"])["sequences"][0]["tokens"] == NOTES["sampled"]
        assert "2 operations applied again" not in gateway.log.read_text()  # all of its log, not a part
        checkpoints = http.get(f"/api/v1/training_runs/{NOTES['run']}/checkpoints").json()["checkpoints"]
        assert {each["checkpoint_id"] for each in checkpoints} == {"weights/middle", "sampler_weights/said"}
        assert _number(outcome(http, resumed(http, NOTES["saved"]))) == expected[6]
    assert gateway.stop() == 0


def resumed(http: httpx.Client, path: str) -> str:
    """A new run that begins at a checkpoint of the old one, with its optimizer: the promise of its next pass."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    create = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model"}
    made = http.post("/api/v1/create_model", json={**create, "lora_config": {"rank": 2, "seed": 9}}).json()
    load = {"model_id": made["model_id"], "seq_id": 1, "path": path, "optimizer": True}
    assert (
        outcome(http, http.post("/api/v1/load_weights", json=load).json()["request_id"])["type"]
        == "load_weights"
    )
    promise: str = send_pass(http, made["model_id"], 2, [FIRST_TOKENS[3], 1, 4, 1, 5, 9]).json()["request_id"]
    return promise
