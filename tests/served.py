"""A gateway as its users meet it: `uvicorn gateway.app:app` in a process of its own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

FAKE_ENGINE = {"name": "fake", "plugin": "fake", "base_model": "fake/model"}
TINY_ENGINE = {
    "name": "tiny",
    "base_model": "tandem/tiny",
    "options": {"threads": 2},
}


class ServedGateway:
    """Started by `start`, stopped by `stop` or killed by `kill`; the data folder survives both."""

    def __init__(
        self,
        data_dir: Path,
        engines: list[dict[str, Any]] | None = None,
        *,
        host: str = "127.0.0.1",
        **settings: str,
    ) -> None:
        self.data_dir = data_dir
        self._host = host
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir / "gateway.log"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")},
            "TANDEM_DATA_DIR": str(data_dir),
            "TANDEM_ENGINES": json.dumps(engines or [FAKE_ENGINE]),
            "TANDEM_SQLITE_SYNCHRONOUS": "NORMAL",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            **{f"TANDEM_{name.upper()}": value for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def set(self, name: str, value: str) -> None:
        """A setting, for its next start."""
        self._environment[f"TANDEM_{name.upper()}"] = value

    def start(self, timeout_s: float = 60.0) -> None:
        """Returns when every engine has loaded its model."""
        self.launch()
        self.wait_until_ready(timeout_s)

    def launch(self) -> None:
        """Start its process."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "gateway.app:app",
            "--host",
            self._host,
            "--port",
            str(self.port),
            "--no-access-log",
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, cwd=self.data_dir, stdout=log, stderr=log
            )

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.05)
        raise RuntimeError(f"the gateway is not ready; its log:\n{self.log.read_text()[-4000:]}")

    def migrate(self) -> None:
        """Bring the database's schema up to date, as an operator does before the first start on Postgres."""
        subprocess.run(
            [sys.executable, "-m", "gateway.migrate"],
            env=self._environment,
            capture_output=True,
            timeout=60,
            check=True,
        )

    def add_key(self, owner: str) -> str:
        """A new API key, made as an operator makes one beside the gateway; returns when it works, and others do not
        any more: without any key, every one does."""
        command = [sys.executable, "-m", "gateway.keys", "add", owner]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=60, check=True
        )
        key = done.stdout.partition("\n")[0]
        deadline = time.monotonic() + 30
        while self._refuses(key) or not self._refuses("tml-unknown"):
            assert time.monotonic() < deadline, "the gateway does not learn of a new key"
            time.sleep(0.2)
        return key

    def _refuses(self, key: str) -> bool:
        answer = httpx.get(f"{self.url}/api/v1/sessions", headers={"X-API-Key": key}, timeout=30)
        return answer.status_code == 401

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def engine_pids(self) -> list[int]:
        """Process ids of the engines, by the operating system's account."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(child) for child in children]

    def kill(self) -> None:
        """As a power cut would, as far as a process can feel one."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._process = None  # who waits for it to be ready waits for the next one

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def pause(self) -> None:
        """Its process stands still, as on a machine that is suspended."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """After a pause."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Leave no process behind."""
        if self.running:
            self.kill()

    def stop(self, number: int = signal.SIGINT) -> int:
        """As Ctrl-C does, or another signal; the exit status."""
        self.signal(number)
        return self.wait()

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(30)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to ask how it ended."""
    try:
        return "zombie" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def free_port() -> int:
    """A port that is free, and below those that the system gives to outgoing connections: it stays free until it is
    used, also beside other tests."""
    while True:
        port = secrets.choice(range(15_000, 32_000))
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
