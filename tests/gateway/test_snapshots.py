"""Runs are restored from snapshots, whatever is damaged; the database keeps few inputs; replays are checked."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from click.testing import CliRunner

from sdk.cli import main
from tests.gateway.conftest import KEY, begin_run, datum, outcome, send_pass, send_step
from tests.gateway.test_recovery import kill_engine, kill_gateway
from tests.postgres import PostgresServer
from tests.served import FAKE_ENGINE, ServedGateway

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
EVERY = 3
"""Optimizer steps between two snapshots."""


class Trainer:
    """Steps of one pass each, through plain HTTP."""

    def __init__(self, gateway: ServedGateway) -> None:
        self.gateway = gateway
        self.http = httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60)
        self.run_id = begin_run(self.http)
        self.next = 1

    def step(self) -> float:
        """The loss before the step."""
        tokens = [(self.next * 31 + 7 * position) % 250 for position in range(13)]
        promise = send_pass(self.http, self.run_id, self.next, tokens).json()
        loss: float = outcome(self.http, promise["request_id"])["metrics"]["loss:sum"]
        promise = send_step(self.http, self.run_id, self.next + 1).json()
        assert "error" not in outcome(self.http, promise["request_id"])
        self.next += 2
        return loss

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def paced(self, count: int) -> list[float]:
        """The same, waiting for each snapshot that becomes due, as a slow run would."""
        losses = []
        for _ in range(count):
            losses.append(self.step())
            taken = (self.next - 1) // 2
            if taken % EVERY == 0:
                self.snapshots(*[step for step in (taken, taken - EVERY) if step > 0])
        return losses

    def about(self, what: str = "") -> Any:
        """What the admin API says of the run."""
        answer = self.http.get(f"/admin/v1/runs/{self.run_id}{what}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def snapshots(self, *steps: int) -> list[dict[str, Any]]:
        """The run's snapshots, once they contain so many steps, newest first."""
        found: list[dict[str, Any]] = []
        for _ in range(500):
            found = self.about("/snapshots")
            if [each["step"] for each in found] == list(steps):
                return found
            time.sleep(0.02)
        raise AssertionError(f"{found} instead of those after the steps {steps}")

    def close(self) -> None:
        self.http.close()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    gateway = ServedGateway(
        tmp_path / "data", None, snapshot_steps=str(EVERY), snapshot_s="0", duty_s="0.2", snapshot_keep_s="0"
    )
    gateway.start()
    trainer = Trainer(gateway)
    yield trainer
    trainer.close()
    gateway.stop()
    gateway.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of an undisturbed run of a gateway that takes no snapshots."""
    gateway = ServedGateway(tmp_path_factory.mktemp("calm"), None, snapshot_steps="0", snapshot_s="0")
    gateway.start()
    trainer = Trainer(gateway)
    losses = trainer.steps(16)
    trainer.close()
    gateway.stop()
    gateway.close()
    return losses


def folders(gateway: ServedGateway) -> list[Path]:
    """Those of snapshots, oldest first."""
    return sorted(place_of(gateway).iterdir(), key=lambda path: path.stat().st_mtime)


def place_of(gateway: ServedGateway) -> Path:
    """The folder of the snapshots of its database."""
    [place] = (gateway.data_dir / "storage" / "snapshots").iterdir()
    return place


# ---------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_kills_change_no_number_when_runs_come_from_snapshots(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    settings = {"lease_s": "3", "engine_owner_timeout_s": "2", "snapshot_steps": "2", "duty_s": "0.2"}
    if database == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        settings["database_url"] = server.url(
            server.create_database(template=request.getfixturevalue("_pg_template"))
        )
    slow = {**FAKE_ENGINE, "options": {"delay_s": 0.02}}  # so that most of the run is still to come at a kill
    calm = ServedGateway(tmp_path / "calm")
    gateway = ServedGateway(tmp_path / "data", [slow], **settings)
    try:
        calm.start()
        expected = pipelined(calm, {})
        gateway.start()
        assert pipelined(gateway, {8: kill_engine, 16: kill_gateway, 24: kill_engine}) == expected
        log = gateway.log.read_text()
        assert log.count("from the snapshot after operation") >= 3
        assert "other numbers" not in log
    finally:
        calm.close()
        gateway.close()


def pipelined(
    gateway: ServedGateway, disasters: dict[int, Callable[[ServedGateway], None]]
) -> tuple[list[float], bytes]:
    """Losses of 40 steps that are sent at once, and the final adapter; things happen when some results are there."""
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        passes, steps = [], []
        for step in range(40):
            passes.append(client.forward_backward([datum(step)], "cross_entropy"))
            steps.append(client.optim_step(tinker.AdamParams(learning_rate=0.01)))
        losses = []
        for number, future in enumerate(passes):
            losses.append(future.result().metrics["loss:sum"])
            if number in disasters:
                disasters[number](gateway)
        assert all(future.result() for future in steps)
        client.save_state("end").result()
    [adapter] = gateway.data_dir.glob("storage/checkpoints/*/adapter_model.safetensors")
    return losses, adapter.read_bytes()


def test_an_engine_that_dies_between_a_pass_and_its_step_loses_no_gradient(
    trainer: Trainer, calm: list[float]
) -> None:
    losses = trainer.paced(7)
    tokens = [(trainer.next * 31 + 7 * position) % 250 for position in range(13)]
    promise = send_pass(trainer.http, trainer.run_id, trainer.next, tokens).json()
    losses.append(outcome(trainer.http, promise["request_id"])["metrics"]["loss:sum"])
    kill_engine(trainer.gateway)
    assert "error" not in outcome(
        trainer.http, send_step(trainer.http, trainer.run_id, trainer.next + 1).json()["request_id"]
    )
    trainer.next += 2
    assert losses + trainer.steps(8) == calm
    assert (
        "from the snapshot after operation 12: 3 operations applied again" in trainer.gateway.log.read_text()
    )


# ---------------------------------------------------------------------------- bounded


@pytest.mark.slow
def test_the_database_keeps_the_inputs_of_few_steps_however_long_a_run_is(trainer: Trainer) -> None:
    most = rows = 0
    with sqlite3.connect(trainer.gateway.data_dir / "tandem.db") as database:
        for _ in range(20):
            trainer.steps(10)
            [(rows,)] = database.execute("select count(*) from inputs").fetchall()
            most = max(most, rows)
        trainer.snapshots(198, 195)
        for _ in range(200):
            [(rows,)] = database.execute("select count(*) from inputs").fetchall()
            if rows <= 1 + 2 * (200 - 195) and len(folders(trainer.gateway)) <= 4:
                break
            time.sleep(0.05)
        [(left,)] = database.execute(
            "select min(seq_id) from futures join inputs using (request_id) where seq_id > 0"
        )
    database.close()
    assert rows == 1 + 2 * (200 - 195)  # the creation, and what came after the older snapshot
    assert left == 2 * 195 + 1
    assert most < 200, "of 400 operations"
    assert len(folders(trainer.gateway)) <= 4
    kill_engine(trainer.gateway)
    trainer.step()


def test_a_run_that_takes_no_step_keeps_few_inputs_and_its_gradient(trainer: Trainer) -> None:
    """As an evaluation does that calls forward_backward alone."""
    passes = 140

    def kept() -> int:
        with contextlib.closing(sqlite3.connect(trainer.gateway.data_dir / "tandem.db")) as database:
            query = "select count(*) from futures join inputs using (request_id) where run_id = ?"
            return int(database.execute(query, (trainer.run_id,)).fetchone()[0])

    def evaluate() -> None:
        for number in range(1, passes + 1):
            promise = send_pass(trainer.http, trainer.run_id, number, [number % 250, 1, 2, 3]).json()
            assert "error" not in outcome(trainer.http, promise["request_id"])

    def step() -> tuple[dict[str, Any], float]:
        trainer.next = passes + 2
        taken = outcome(
            trainer.http, send_step(trainer.http, trainer.run_id, passes + 1).json()["request_id"]
        )
        return taken["metrics"], trainer.step()

    evaluate()
    expected = step()
    trainer.run_id = begin_run(trainer.http)
    evaluate()
    for _ in range(600):
        if kept() <= 1 + passes - 64:
            break
        time.sleep(0.05)
    assert kept() == 1 + passes - 64  # the creation, and what came after the older of two snapshots
    kill_engine(trainer.gateway)
    assert step() == expected
    assert "the snapshot after operation 128: 12 operations applied again" in trainer.gateway.log.read_text()


# ---------------------------------------------------------------------------- damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "is not what was written"), (flip, "is not what was written"), (Path.unlink, "holds no")],
)
def test_a_damaged_snapshot_is_told_and_the_one_before_is_taken(
    trainer: Trainer, calm: list[float], damage: Callable[[Path], None], words: str
) -> None:
    losses = trainer.paced(10)
    damage(folders(trainer.gateway)[-1] / "optimizer.safetensors")
    kill_engine(trainer.gateway)
    losses += trainer.steps(1)
    damages = {each["step"]: each["damage"] for each in trainer.snapshots(11, 9, 6)}  # replayed steps count
    assert words in damages[9] and "optimizer.safetensors" in damages[9]
    assert damages[6] is None
    log = trainer.gateway.log.read_text()
    assert "after operation 18 is damaged: " in log
    assert "from the snapshot after operation 12: 8 operations applied again" in log
    shown = CliRunner().invoke(
        main, ["runs", trainer.run_id], env={"TANDEM_URL": trainer.gateway.url, "TANDEM_API_KEY": KEY}
    )
    assert "step 9, just now, damaged: " in shown.output, shown.output
    assert losses + trainer.steps(5) == calm
    assert all(each["damage"] is None for each in trainer.snapshots(14, 11))


def test_all_snapshots_out_of_reach_fail_operations_until_they_are_back(
    trainer: Trainer, calm: list[float]
) -> None:
    losses = trainer.paced(10)
    storage = trainer.gateway.data_dir / "storage"
    for _ in range(200):  # until a duty has pruned the inputs, there is the whole log
        if "'inputs behind snapshots'" in trainer.gateway.log.read_text():
            break
        time.sleep(0.05)
    (storage / "snapshots").rename(storage / "elsewhere")
    kill_engine(trainer.gateway)
    failed = outcome(trainer.http, send_step(trainer.http, trainer.run_id, trainer.next).json()["request_id"])
    assert failed["category"] == "server"
    for words in (
        "cannot be restored",
        "after operation 18",
        "after operation 12",
        "nothing stored under snapshots/",
    ):
        assert words in failed["error"]
    (storage / "elsewhere").rename(storage / "snapshots")
    trainer.next += 2  # so that the passes are those of the calm run: number 22 was never sent
    promise = send_pass(trainer.http, trainer.run_id, 22, [1, 2, 3]).json()
    outcome(trainer.http, promise["request_id"])
    assert losses == calm[:10]
    assert {each["damage"] for each in trainer.about("/snapshots")} == {None} | {
        each["damage"] for each in trainer.about("/snapshots") if each["step"] == 6
    }


def test_a_snapshot_that_cannot_be_written_is_told_and_nothing_is_lost(
    trainer: Trainer, calm: list[float]
) -> None:
    """The system refuses in the middle of a file, as a full disk does."""
    losses = trainer.paced(7)
    [engine] = trainer.gateway.engine_pids()
    _, hard = resource.prlimit(engine, resource.RLIMIT_FSIZE)
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (1000, hard))
    losses += trainer.steps(3)
    for _ in range(200):
        if trainer.about()["snapshot_problem"]:
            break
        time.sleep(0.02)
    assert "cannot be written to (File too large)" in trainer.about()["snapshot_problem"]
    assert "after operation 18 was not written" in trainer.gateway.log.read_text()
    trainer.snapshots(6, 3)
    assert len(folders(trainer.gateway)) == 2  # nothing half written is left
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (hard, hard))
    losses += trainer.steps(3)
    trainer.snapshots(12, 6)
    assert trainer.about()["snapshot_problem"] is None
    kill_engine(trainer.gateway)
    assert losses + trainer.steps(3) == calm


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into folders that are read-only")
def test_a_folder_that_is_read_only_is_told(trainer: Trainer, calm: list[float]) -> None:
    losses = trainer.paced(7)
    place = place_of(trainer.gateway)
    place.chmod(0o500)
    losses += trainer.steps(3)
    assert "Permission denied" in trainer.about()["snapshot_problem"]
    kill_engine(trainer.gateway)
    losses += trainer.steps(2)
    place.chmod(0o700)
    assert losses + trainer.steps(4) == calm


def test_what_was_left_half_written_is_removed_by_the_next_gateway(trainer: Trainer) -> None:
    trainer.paced(7)
    place = place_of(trainer.gateway)
    long_ago = time.time() - 7200
    for name in ("0" * 32, f".{'1' * 32}.{'2' * 32}.partial"):
        shutil.copytree(folders(trainer.gateway)[0], place / name)
    for path in (*place.glob("*/*"), *place.iterdir()):
        os.utime(path, (long_ago, long_ago))
    shutil.copytree(folders(trainer.gateway)[-1], place / ("3" * 32))
    (place / ("3" * 32) / "new").write_bytes(b"being written")
    known = {path.name for path in folders(trainer.gateway)} - {"0" * 32, f".{'1' * 32}.{'2' * 32}.partial"}
    trainer.gateway.kill()
    database = trainer.gateway.data_dir / "tandem.db"
    with sqlite3.connect(database) as connection:  # the duty is due once an hour
        connection.execute("delete from duties where name = 'stray snapshots'")
    connection.close()
    trainer.gateway.start()
    for _ in range(200):
        if {path.name for path in folders(trainer.gateway)} == known:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folders(trainer.gateway)} instead of {known}")


# ---------------------------------------------------------------------------- checked


def test_a_replay_with_other_numbers_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    """An engine whose every process tells other losses."""
    engine = {**FAKE_ENGINE, "options": {"drift": 0.25}}
    gateway = ServedGateway(tmp_path / "data", [engine], snapshot_steps=str(EVERY), snapshot_s="0")
    gateway.start()
    trainer = Trainer(gateway)
    try:
        trainer.paced(4)
        assert trainer.about()["replay_difference"] is None
        os.kill(gateway.engine_pids()[0], signal.SIGKILL)
        trainer.step()
        told = trainer.about()["replay_difference"]
        assert "forward_backward 7: loss" in told
        error_id = told.rpartition(" ")[2]
        assert (
            f"error {error_id}: the replay of run {trainer.run_id} gives other numbers"
            in gateway.log.read_text()
        )
        shown = CliRunner().invoke(
            main, ["runs", trainer.run_id], env={"TANDEM_URL": gateway.url, "TANDEM_API_KEY": KEY}
        )
        assert error_id in " ".join(shown.output.split())
        trainer.steps(2)
    finally:
        trainer.close()
        gateway.stop()
        gateway.close()
