"""quickstart.py as a user sees it: what it prints, how it ends, and that nothing keeps running."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.project.source import ROOT

Start = Callable[..., subprocess.Popen[str]]
_WITHOUT_INSTALLING = """
import pathlib, sys, bootstrap, quickstart
bootstrap.install = lambda extras: pathlib.Path(sys.argv[1])
quickstart.GIVE_UP_AFTER_S = 0.5
sys.exit(quickstart.main(sys.argv[2:]))
"""


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Start]:
    """Start quickstart.py with a stand-in for the installed interpreter."""
    python = tmp_path / "python"
    fake = Path(__file__).with_name("fake_python.py")
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(fake))} "$@"\n')
    python.chmod(0o755)
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WITHOUT_INSTALLING, str(python), "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--data", str(tmp_path / "data"), *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, as a user does, for its gateway is in a session of its own and would outlive it."""
    with process:
        if process.poll() is not None:
            return
        process.terminate()
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What a process prints, up to the line that holds the words."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    raise AssertionError(f"it never printed {words!r}, but:\n{printed}")


def is_free(port: int) -> bool:
    """Whether nobody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_it_trains_then_stops_when_asked_to(start: Start, port: int, tmp_path: Path) -> None:
    process = start("--exit")
    printed, _ = process.communicate()
    assert process.returncode == 0
    told = [
        "The gateway is ready",
        f"the recipe runs: cookbook/sl_loop.py --base-url http://127.0.0.1:{port}",
    ]
    positions = [printed.index(words) for words in [*told, "Trained and sampled in", "Stopped."]]
    assert positions == sorted(positions)
    assert (
        f"closed in good order, data in {tmp_path / 'data'}"
        in (tmp_path / "data" / "gateway.log").read_text()
    )
    assert is_free(port)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_stays_until_it_is_interrupted(start: Start, port: int, ending: signal.Signals) -> None:
    process = start("--no-train")
    read_until(process, f"keeps running at http://127.0.0.1:{port}; stop it with Ctrl-C")
    read_until(process, "/docs")
    assert not is_free(port)
    process.send_signal(ending)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert "Stopped. What was trained is kept in the data folder;\n" in printed
    assert is_free(port)


def test_an_interrupt_while_training_stops_everything(start: Start, port: int) -> None:
    process = start(FAKE_RECIPE="long")
    read_until(process, "the recipe runs")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    assert "Stopped." in printed
    assert is_free(port)


def test_a_recipe_that_fails_is_reported(start: Start, port: int) -> None:
    process = start(FAKE_RECIPE="7")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "The recipe failed (exit code 7)" in printed
    assert "Traceback" not in printed
    assert is_free(port)


def test_a_gateway_that_does_not_start_is_quoted(start: Start) -> None:
    process = start("--exit", FAKE_GATEWAY="refuses")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "The gateway stopped while starting." in printed
    assert "    the settings name no engine" in printed


def test_what_engines_do_is_shown_while_waiting(start: Start) -> None:
    process = start("--no-train", "--exit", FAKE_GATEWAY="loads")
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert printed.count("  engine tiny: starting\n") == 1


def test_an_engine_that_cannot_start_is_not_waited_for(start: Start, port: int) -> None:
    process = start("--exit", FAKE_GATEWAY="broken")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "  engine tiny: down: the model cannot be found\n" in printed
    assert "An engine does not start." in printed
    assert is_free(port)


def test_a_gateway_that_ends_by_itself_is_an_error(start: Start) -> None:
    process = start("--no-train", FAKE_GATEWAY="fails")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "The gateway ended (exit code 5)." in printed


def test_the_log_of_an_earlier_gateway_is_not_quoted(start: Start, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gateway.log").write_text("an old trouble\n")
    printed, _ = start("--exit", FAKE_GATEWAY="refuses").communicate()
    assert "    the settings name no engine" in printed
    assert "an old trouble" not in printed


def test_an_engine_that_cannot_load_ends_it_at_once(start: Start, port: int) -> None:
    process = start("--exit", FAKE_GATEWAY="failed")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "An engine cannot load its model.\n  engine tiny: failed: there is no such folder\n" in printed
    assert is_free(port)


def test_nothing_keeps_running_when_nobody_reads_any_more(start: Start, port: int) -> None:
    """`python3 quickstart.py | head -1`."""
    process = start()
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert is_free(port)


def test_a_gateway_that_somebody_stops_is_no_error(start: Start) -> None:
    process = start("--no-train", FAKE_GATEWAY="stopped")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed


def test_a_tandem_that_runs_there_already_is_recognised(start: Start, port: int) -> None:
    first = start("--no-train", FAKE_GATEWAY="tandem")
    read_until(first, "/docs")
    second = start("--exit")
    printed, _ = second.communicate()
    assert second.returncode == 1
    assert f"A Tandem runs already at http://127.0.0.1:{port}\n(process 7, data in /srv/data).\n" in printed
    assert f".venv/bin/tandem stop --url http://127.0.0.1:{port}\n" in printed
    assert f"quickstart.py --port {port + 1} --data data-{port + 1}" in printed
    assert "Starting" not in printed


def test_a_data_folder_in_use_is_named_before_anything_is_started(start: Start, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "tandem.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        process = start("--exit")
        printed, _ = process.communicate()
    assert process.returncode == 1
    assert f"A gateway (process 4711) uses the data folder {tmp_path / 'data'}\n" in printed
    assert not (tmp_path / "data" / "gateway.log").exists()


def test_a_port_in_use_is_named_before_anything_is_installed(start: Start, port: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        process = start("--exit")
        printed, _ = process.communicate()
    assert process.returncode == 1
    assert f"Port {port} cannot be used" in printed
    assert "quickstart.py --port" in printed
    assert "Starting" not in printed


def test_a_port_is_a_number_that_there_is(start: Start) -> None:
    process = start("--exit", "--port", "70000")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "--port is 70000; a port is a number from 1 to 65535." in printed
