"""What the benchmarks share: a gateway to measure, processor time by process, medians, and where results go."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
KEY = "tml-benchmark"
_TICKS = os.sysconf("SC_CLK_TCK")


class Measured:
    """A gateway in a process of its own, with one engine."""

    def __init__(
        self, folder: Path, engine: dict[str, Any], database_url: str | None = None, **settings: str
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self._engine = engine
        self._database_url = database_url
        self._settings = {f"TANDEM_{name.upper()}": value for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when its engine has loaded its model."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")},
            "TANDEM_DATA_DIR": str(self._folder),
            "TANDEM_ENGINES": json.dumps([self._engine]),
            "PYTHONPATH": str(ROOT),
            **self._settings,
        }
        if self._database_url is not None:
            environment["TANDEM_DATABASE_URL"] = self._database_url
            subprocess.run(
                [sys.executable, "-m", "gateway.migrate"], env=environment, check=True, timeout=120
            )
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-m", "uvicorn", "gateway.app:app", "--port", port, "--no-access-log"]
        with (self._folder / "gateway.log").open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=10).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
        raise RuntimeError(
            f"the gateway did not become ready: {(self._folder / 'gateway.log').read_text()[-2000:]}"
        )

    def stop(self) -> None:
        """End it and its engine."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


@contextmanager
def gateway(
    folder: Path, engine: dict[str, Any], database_url: str | None = None, **settings: str
) -> Iterator[Measured]:
    """A gateway for the time of a measurement."""
    measured = Measured(folder, engine, database_url, **settings)
    try:
        measured.start()
        yield measured
    finally:
        measured.stop()


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int:
    """Memory that a process occupies."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_of(pid: int) -> int:
    """Threads that a process has."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[17])


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def keep(name: str, results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write the results, by default where docs/benchmarks.md takes them from."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
