"""What it costs that an engine runs on a Ray node instead of in a process of the gateway's machine.

    python -m benchmarks.placement [--smoke]

The smallest future, as in benchmarks.roundtrip, in turn through two gateways that differ in nothing else; both engines
are the numpy one, and the node is on the same machine: what is measured is the way, not the network. Needs the extra
`ray`; a cluster is started for the time of the measurement, with a token of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measuring import KEY, RESULTS, Measured, free_port, gateway, keep, median
from benchmarks.roundtrip import ENGINE, SMOKE, client_process

LOADS = {"1 client": (1, 500), "16 clients": (16, 150)}
"""Clients at once, and futures of each."""
_PATIENCE_S = 120.0


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """A node that is a whole cluster; gives its address. This process's environment has its token then."""
    os.environ.update(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0"
    )
    port = free_port()
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    log = folder / "ray.log"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with log.open("wb") as out:
        node = subprocess.Popen(
            [*command, "--include-dashboard=false"], stdout=out, stderr=out, env=environment
        )
    try:
        yield f"{_own_ip(node, log)}:{port}"
    finally:
        node.terminate()
        node.wait(_PATIENCE_S)


def _own_ip(node: subprocess.Popen[bytes], log: Path) -> str:
    """Where the node says that it is, once it runs."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and node.poll() is None:
        said = log.read_text()
        found = re.search(r"Local node IP: ([0-9a-f.:]+)", said)
        if found and "Ray runtime started" in said:
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"Ray has not started: {log.read_text()[-2000:]}")


def back_after(measured: Measured) -> float:
    """Seconds from the kill of the engine's process to the answer of the one after it."""
    with httpx.Client(base_url=measured.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        [engine] = http.get("/admin/v1/engines").json()["items"]
        begun = time.monotonic()
        os.kill(engine["pid"], 9)
        while time.monotonic() - begun < _PATIENCE_S:
            [now] = http.get("/admin/v1/engines").json()["items"]
            if now["state"] == "ready" and now["starts"] > engine["starts"]:
                return time.monotonic() - begun
            time.sleep(0.02)
    raise RuntimeError("the engine has not come back")


def measure(here: Measured, there: Measured, repeats: int, share: float) -> dict[str, Any]:
    """Both in turn, so that whatever else the machine does meets both."""
    sides = {"here": here, "ray": there}
    results: dict[str, Any] = {name: {} for name in sides}
    for side in sides.values():
        client_process("futures", side.url, 4, int(100 * share))  # warm-up
    for load, (clients, futures) in LOADS.items():
        rounds = [
            {
                name: client_process("futures", side.url, clients, int(futures * share))
                for name, side in sides.items()
            }
            for _ in range(repeats)
        ]
        for name in sides:
            runs = [done[name] for done in rounds]
            results[name][load] = {key: median([run[key] for run in runs]) for key in runs[0]}
    for name, side in sides.items():
        results[name]["back_after_s"] = median([back_after(side) for _ in range(repeats)])
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    repeats, share = (1, SMOKE) if args.smoke else (args.repeats, 1.0)
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3)]
        address = stack.enter_context(cluster(folders[0]))
        here = stack.enter_context(gateway(folders[1], ENGINE))
        there = stack.enter_context(gateway(folders[2], {**ENGINE, "ray": {"address": address}}))
        results = measure(here, there, repeats, share)
    keep("placement", results, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
