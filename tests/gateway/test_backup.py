"""What docs/operations.md says of backups: taken while the gateway runs, and as good as the original."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import httpx

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.served import ServedGateway

TOKENS = [3, 1, 4, 1, 5]


def take_steps(http: httpx.Client, run_id: str, first: int) -> list[float]:
    """Losses of three steps, whose operations are numbered from `first`."""
    losses = []
    for seq_id in range(first, first + 6, 2):
        promise = send_pass(http, run_id, seq_id, TOKENS).json()
        losses.append(outcome(http, promise["request_id"])["metrics"]["loss:sum"])
        outcome(http, send_step(http, run_id, seq_id + 1).json()["request_id"])
    return losses


def test_a_backup_of_a_running_gateway_goes_on_where_it_was_taken(tmp_path: Path) -> None:
    original, restored = ServedGateway(tmp_path / "data"), ServedGateway(tmp_path / "restored")
    try:
        original.start()
        with httpx.Client(base_url=original.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            run_id = begin_run(http)
            take_steps(http, run_id, 1)
            save = {"model_id": run_id, "seq_id": 7, "path": "kept"}
            path = outcome(http, http.post("/api/v1/save_weights", json=save).json()["request_id"])["path"]
            back_up(original.data_dir, restored.data_dir)
            expected = take_steps(http, run_id, 8)
        original.stop()
        restored.start()
        with httpx.Client(base_url=restored.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            assert take_steps(http, run_id, 8) == expected
            session = run_id.partition(":")[0]
            load = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
            forked = http.post("/api/v1/load_weights", json=load).json()["model_id"]
            assert take_steps(http, forked, 1) == expected
    finally:
        original.close()
        restored.close()


def back_up(data: Path, to: Path) -> None:
    """Database first, then storage. `VACUUM INTO` is one of the two ways that the page names."""
    to.mkdir()
    with sqlite3.connect(data / "tandem.db") as database:
        database.execute("VACUUM INTO ?", (str(to / "tandem.db"),))
    database.close()
    shutil.copytree(data / "storage", to / "storage")
