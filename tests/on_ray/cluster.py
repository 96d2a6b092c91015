"""A Ray cluster on this machine whose nodes come and go: raylets of their own, as on machines of their own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.threads import beside

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


def token() -> dict[str, str]:
    """Variables with which Ray wants a token, a new one."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}


class RayCluster:
    """A head without any CPU, beside which gateways run, and the nodes that are added."""

    def __init__(self, variables: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.on_ray.cluster_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            )
        self.address = str(self._answer("address"))

    @property
    def pid(self) -> int:
        """The process below which all of it runs."""
        return self._process.pid

    def add(self, name: str, **options: Any) -> None:
        """A node; `options` are those of Ray's utility."""
        self._tell(f"add {name} {json.dumps(options)}")

    def remove(self, name: str) -> None:
        """Kill everything of a node."""
        self._tell(f"remove {name}")

    def close(self) -> None:
        """Leave no process behind."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        self._answer("done")

    def _answer(self, name: str) -> Any:
        """What the next line of JSON says; Ray prints lines of its own."""
        assert self._process.stdout is not None
        lines = self._process.stdout

        def read() -> Any:
            for line in lines:
                if line.startswith(b"{"):
                    return json.loads(line)[name]
            raise AssertionError(f"the cluster has ended: {self._log.read_text()[-2000:]}")

        return beside(read).result(PATIENCE_S)
