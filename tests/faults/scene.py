"""What faults happen to: gateways with their engines, their database, and the fixed address in front of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.faults.proxy import FailOver
from tests.faults.workload import KEY
from tests.postgres import PostgresServer
from tests.served import ServedGateway

LEASE_S = 3.0
SILENCE_S = 2.0
_IMPATIENT = {
    "lease_s": f"{LEASE_S}",
    "engine_silence_s": f"{SILENCE_S}",
    "snapshot_steps": "5",
    "engine_owner_timeout_s": f"{LEASE_S * 2 / 3}",
    # No growing pauses and no blame: here most deaths are the harness's doing, hundreds of them in a row.
    "engine_restart_delay_s": "0",
    "max_attempts": "1000",
}
_READY_WITHIN_S = 120.0

DatabaseName = Literal["sqlite", "postgres"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What is served, on what. `tolerance` is the largest relative difference between the numbers of two runs."""

    database: DatabaseName
    engine: str
    base_model: str
    options: dict[str, Any] = field(default_factory=dict)
    plugin: str = "fake"
    tolerance: float = 0.0
    gateways: int = 1
    steps: int = 40

    @property
    def name(self) -> str:
        """For reports."""
        gateways = f", {self.gateways} gateways" if self.gateways > 1 else ""
        return f"{self.database}, {self.engine}{gateways}"


class Scene:
    """Made by `staged`."""

    def __init__(self, kind: Kind, folder: Path, server: PostgresServer | None) -> None:
        self.kind = kind
        self.folder = folder
        self.server = server
        self.damaged: set[str] = set()
        """Names of the folders of snapshots that were damaged on purpose."""
        self._engines: set[int] = set()
        self.database = server.create_database() if server is not None else ""
        settings = dict(_IMPATIENT)
        if server is not None:
            settings["database_url"] = server.url(self.database)
        engine = {
            "name": "tested",
            "plugin": kind.plugin,
            "base_model": kind.base_model,
            "options": kind.options,
        }
        self.gateways = [ServedGateway(folder, [engine], **settings) for _ in range(kind.gateways)]
        for number, gateway in enumerate(self.gateways, start=1):
            gateway.log = folder / f"gateway-{number}.log"
            gateway.set("internal_url", gateway.url)

    @property
    def sync_url(self) -> str:
        """Of the database, for reading it with a driver that blocks."""
        if self.server is None:
            return f"sqlite:///{self.folder / 'tandem.db'}"
        return self.server.url(self.database).replace("+asyncpg", "+psycopg")

    def start(self) -> None:
        """Returns when one gateway has its engine; all others answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.server is not None:
            self.gateways[0].migrate()
        for gateway in self.gateways:
            gateway.launch()
        self.wait_until_served()

    def wait_until_served(self) -> None:
        """Returns when some gateway takes work. Raises RuntimeError with the logs' ends."""
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline:
            for gateway in self.gateways:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{gateway.url}/readyz", timeout=2).status_code == 200:
                        return
            time.sleep(0.1)
        raise RuntimeError(f"no gateway takes work; their logs end with:\n{self.end_of_logs()}")

    def end_of_logs(self) -> str:
        """The newest lines of all gateways."""
        return "\n".join(f"{g.log}:\n{g.log.read_text()[-3000:]}" for g in self.gateways if g.log.exists())

    def engine_pids(self) -> list[int]:
        """The engine processes that there are now."""
        pids = []
        for gateway in self.gateways:
            if gateway.running:
                with contextlib.suppress(OSError):
                    pids += gateway.engine_pids()
        found = [pid for pid in pids if _is_engine(pid)]
        self._engines.update(found)
        return found

    def stop(self) -> list[int]:
        """End it as an operator does; the exit statuses."""
        return [gateway.stop() for gateway in self.gateways]

    def close(self) -> None:
        """Leave nothing running."""
        for gateway in self.gateways:
            gateway.close()
        for pid in filter(
            _is_engine, self._engines
        ):  # one that was stopped does not see that its owner has gone
            os.kill(pid, signal.SIGKILL)


def _is_engine(pid: int) -> bool:
    try:
        return b"engines.host" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def staged(kind: Kind, folder: Path) -> Iterator[tuple[Scene, FailOver]]:
    """A scene that runs, and its address, until the block ends. What it has written stays in the folder."""
    with contextlib.ExitStack() as leaving:
        server = None
        if kind.database == "postgres":
            server = PostgresServer(durable=True)
            leaving.callback(server.close)
        scene = Scene(kind, folder, server)
        leaving.callback(scene.close)
        scene.start()
        answers = {"/api/v1/client/config": _client_config(scene.gateways[0])}
        proxy = FailOver([gateway.port for gateway in scene.gateways], answers)
        yield scene, leaving.enter_context(proxy.running())


def _client_config(gateway: ServedGateway) -> bytes:
    """What the gateway tells clients, but that a pass of three data is to be sent as two requests."""
    url = f"{gateway.url}/api/v1/client/config"
    told = httpx.post(url, json={}, headers={"X-API-Key": KEY}).raise_for_status().json()
    return json.dumps({**told, "fwdbwd_max_chunk_len": 2, "pjwt_auth_enabled": False}).encode()
