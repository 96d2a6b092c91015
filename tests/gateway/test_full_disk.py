"""A disk that is full or read-only: a clear error, nothing broken, and all as before when there is room again."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.gateway.small_disk import SmallDisk, may_mount
from tests.postgres import PostgresServer
from tests.served import ServedGateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not may_mount(), reason="a small disk has to be mounted, which this account may not"),
    pytest.mark.timeout(240),
]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6] * 400
"""Of a pass whose input and result take some ten kilobytes each."""


def client(gateway: ServedGateway) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60, trust_env=False)


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    """Where a server's own account gets to as well."""
    folder = Path(tempfile.mkdtemp(prefix="disk-", dir="/tmp"))
    folder.chmod(0o755)
    disk = SmallDisk(folder, 12)
    yield disk
    disk.close()
    folder.rmdir()


@pytest.fixture
def reference(tmp_path: Path) -> Iterator[Callable[[int], dict[str, Any]]]:
    """What a run is like whose disk was never full: its last pass, after so many passes, each with a step."""
    gateway = ServedGateway(tmp_path / "reference")
    gateway.start()

    def trained(steps: int) -> dict[str, Any]:
        with client(gateway) as http:
            run_id = begin_run(http)
            for step in range(steps):
                send_pass(http, run_id, 2 * step + 1, TOKENS)
                send_step(http, run_id, 2 * step + 2)
            return outcome(http, send_pass(http, run_id, 2 * steps + 1, TOKENS).json()["request_id"])

    yield trained
    gateway.stop()
    gateway.close()


def accepted_until_full(http: httpx.Client, run_id: str) -> tuple[list[str], httpx.Response]:
    """Passes and steps in turn until one is refused: ids of those that were accepted, and the refusal."""
    promises: list[str] = []
    for number in range(1, 5000):
        sent = send_pass(http, run_id, number, TOKENS) if number % 2 else send_step(http, run_id, number)
        if sent.status_code != 200:
            return promises, sent
        promises.append(sent.json()["request_id"])
    raise AssertionError("the disk does not become full")


def eventually(send: Callable[[], httpx.Response]) -> httpx.Response:
    """As the SDK does: again, while it is 503."""
    deadline = time.monotonic() + 60
    while (answer := send()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    return answer


def fill_train_and_go_on(
    gateway: ServedGateway, disk: SmallDisk, leave: int, reference: Callable[[int], dict[str, Any]]
) -> None:
    """Whoever was answered with an id gets an outcome, the refused are told why, and the run is as if nothing was."""
    with client(gateway) as http:
        run_id = begin_run(http)
        disk.fill(leave)
        promises, refused = accepted_until_full(http, run_id)
        assert refused.status_code == 503, refused.text
        assert refused.json()["code"] == "store_unavailable"
        assert "log says why" in refused.json()["detail"]
        assert int(refused.headers["Retry-After"]) >= 1
        unready = http.get("/readyz")
        assert unready.status_code == 503
        assert "No space left" in unready.json()["problem"] or "full" in unready.json()["problem"]
        for path in ("/healthz", f"/admin/v1/runs/{run_id}", "/api/v1/training_runs"):
            assert http.get(path).status_code == 200  # what needs no room goes on
        disk.empty()
        gateway.wait_until_ready()  # by itself: nobody has sent anything else
        number = len(promises) + 1
        again = (
            (lambda: send_pass(http, run_id, number, TOKENS))
            if number % 2
            else (lambda: send_step(http, run_id, number))
        )
        promises.append(eventually(again).json()["request_id"])
        if number % 2:
            promises.append(eventually(lambda: send_step(http, run_id, number + 1)).json()["request_id"])
        for promise in promises:
            assert "error" not in outcome(http, promise)
        steps = len(promises) // 2
        last = outcome(http, send_pass(http, run_id, 2 * steps + 1, TOKENS).json()["request_id"])
        assert http.get(f"/admin/v1/runs/{run_id}").json()["step"] == steps
        assert last["metrics"] == reference(steps)["metrics"]
        assert last["loss_fn_outputs"] == reference(steps)["loss_fn_outputs"]


def test_the_embedded_database_on_a_full_disk(
    disk: SmallDisk, tmp_path: Path, reference: Callable[[int], dict[str, Any]]
) -> None:
    gateway = ServedGateway(disk.folder / "data")
    gateway.log = tmp_path / "gateway.log"  # as an operator's log, it is on another disk
    gateway.start()
    try:
        fill_train_and_go_on(gateway, disk, 400_000, reference)
        gateway.stop()
        with closing(sqlite3.connect(disk.folder / "data" / "tandem.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert "database or disk is full" in gateway.log.read_text()
    finally:
        gateway.close()


def test_a_gateway_that_is_killed_on_a_full_disk_goes_on_when_there_is_room(
    disk: SmallDisk, tmp_path: Path, reference: Callable[[int], dict[str, Any]]
) -> None:
    gateway = ServedGateway(disk.folder / "data")
    gateway.log = tmp_path / "gateway.log"
    gateway.start()
    try:
        with client(gateway) as http:
            run_id = begin_run(http)
            disk.fill(400_000)
            promises, _ = accepted_until_full(http, run_id)
            gateway.kill()
            disk.empty()
            gateway.start()
            for promise in promises:
                assert "error" not in outcome(http, promise)
            steps = len(promises) // 2
            if len(promises) % 2:
                steps += 1
                outcome(http, send_step(http, run_id, len(promises) + 1).json()["request_id"])
            last = outcome(http, send_pass(http, run_id, 2 * steps + 1, TOKENS).json()["request_id"])
            assert last["metrics"] == reference(steps)["metrics"]
    finally:
        gateway.close()


@pytest.mark.postgres
def test_postgres_on_a_full_disk(
    disk: SmallDisk, tmp_path: Path, reference: Callable[[int], dict[str, Any]]
) -> None:
    """The tables lie on the small disk; where the server's own log has no room it ends itself, which is an outage."""
    server = PostgresServer()
    gateway = None
    try:
        place = disk.folder / "tables"
        place.mkdir(mode=0o777)
        server.give(place)
        with psycopg.connect(host=str(server.folder), user="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'".encode())
            connection.execute(b"CREATE DATABASE tight TABLESPACE small")
        gateway = ServedGateway(tmp_path / "data", database_url=server.url("tight"))
        gateway.migrate()
        gateway.start()
        fill_train_and_go_on(gateway, disk, 200_000, reference)
        assert "53100" in gateway.log.read_text() or "No space left" in gateway.log.read_text()
    finally:
        if gateway is not None:
            gateway.close()
        server.close()


def saved(http: httpx.Client, run_id: str, seq_id: int, name: str) -> dict[str, Any]:
    body = {"model_id": run_id, "seq_id": seq_id, "path": name}
    return outcome(http, http.post("/api/v1/save_weights", json=body).json()["request_id"])


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_save_that_finds_no_room_fails_and_says_so(disk: SmallDisk, tmp_path: Path, trouble: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "storage").symlink_to(disk.folder, target_is_directory=True)
    gateway = ServedGateway(data)
    gateway.start()
    try:
        with client(gateway) as http:
            run_id = begin_run(http)
            kept = saved(http, run_id, 1, "before")["path"]
            before = sorted(path.name for path in (disk.folder / "checkpoints").iterdir())
            if trouble == "full":
                disk.fill(1000)
            else:
                disk.set_read_only(True)
            failed = saved(http, run_id, 2, "lost")
            assert failed["category"] == "server", failed
            words = "No space left on device" if trouble == "full" else "Read-only file system"
            assert words in failed["error"] and "log says more under" in failed["error"]
            assert str(disk.folder) not in failed["error"]
            assert outcome(http, send_pass(http, run_id, 3, [1, 2, 3]).json()["request_id"])["metrics"]
            if trouble == "full":
                disk.empty()
            else:
                disk.set_read_only(False)
            assert sorted(path.name for path in (disk.folder / "checkpoints").iterdir()) == before
            assert "path" in saved(
                http, run_id, 4, "lost"
            )  # the name is free, for nothing was saved under it
            names = {row["checkpoint_id"] for row in http.get("/api/v1/checkpoints").json()["checkpoints"]}
            assert names == {"weights/before", "weights/lost"}
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            load = {"session_id": session, "model_seq_id": 0, "path": kept}
            promise = http.post("/api/v1/load_weights", json=load).json()
            assert outcome(http, promise["request_id"])["type"] == "load_weights"
    finally:
        gateway.stop()
        gateway.close()
