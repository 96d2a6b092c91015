"""`tandem serve`: a gateway in a real process, started, used and ended as from a terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = '[[engines]]\nname = "numpy"\nplugin = "fake"\nbase_model = "fake/model"\n'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serving:
    """A `tandem serve` under way."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
        environment |= {"PYTHONPATH": str(ROOT), "TANDEM_URL": "http://elsewhere", "TANDEM_API_KEY": "tml-x"}
        command = [sys.executable, "-m", "sdk.cli", "serve", "--port", str(self.port), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tandem.toml"
    path.write_text(CONFIG)
    return path


def test_serve_and_end_by_ctrl_c(tmp_path: Path, config: Path) -> None:
    serving = Serving(tmp_path, "--config", config.name, "--data", "kept here")
    try:
        serving.wait_until_ready()
        command = [sys.executable, "-m", "sdk.cli", "engines", "--url", serving.url]
        shown = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert shown.splitlines()[1].split()[:3] == ["numpy", "ready", "fake/model"]
        assert (tmp_path / "kept here" / "tandem.db").exists()
        assert not (tmp_path / "data").exists()
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(30) == 0
        log = serving.log.read_text()
        assert "Listening on" not in log
        assert "GET /readyz" not in log
        assert "Traceback" not in log
    finally:
        serving.process.kill()
        serving.process.wait()


def test_listening_for_others_is_said(tmp_path: Path, config: Path) -> None:
    serving = Serving(tmp_path, "--config", config.name, "--host", "0.0.0.0")
    try:
        serving.wait_until_ready()
        warned = serving.log.read_text().splitlines()[0]
        assert "0.0.0.0" in warned
        assert "403" in warned
        assert "tandem keys add" in warned
        assert (tmp_path / "data" / "tandem.db").exists()
    finally:
        serving.process.terminate()
        serving.process.wait(30)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no_such_setting = 1\n", "setting no_such_setting: Object contains unknown field `no_such_setting`"),
        ("[[", "is not TOML"),
        ('data_dir = "wrong.toml/inside"\n', "data_dir is wrong.toml/inside, which cannot be used"),
    ],
)
def test_settings_that_are_wrong_end_it_with_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "wrong.toml").write_text(content)
    serving = Serving(tmp_path, "--config", "wrong.toml")
    try:
        assert serving.process.wait(60) != 0
        log = serving.log.read_text()
        assert sentence in log
        assert "Traceback" not in log
    finally:
        serving.process.kill()
        serving.process.wait()


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path, config: Path) -> None:
    first = Serving(tmp_path, "--config", config.name)
    try:
        first.wait_until_ready()
        (tmp_path / "second").mkdir()
        second = Serving(tmp_path / "second", "--config", str(config), "--data", str(tmp_path / "data"))
        assert second.process.wait(60) != 0
        log = second.log.read_text()
        assert f"another gateway process ({first.process.pid}) uses" in log
        assert "Traceback" not in log
    finally:
        first.process.terminate()
        first.process.wait(30)
