"""The smallest future's round trip: submit an optimizer step, fetch its result; numpy engine, durable store, HTTP.

    python -m benchmarks.roundtrip [--database-url postgresql+asyncpg://…] [--smoke]

The clients are raw: a pooled asyncio HTTP client in a process of its own. Beside it a bare FastAPI echo with the same
client (two requests, as a future takes), and the same future through the official SDK.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.measuring import (
    KEY,
    RESULTS,
    free_port,
    gateway,
    keep,
    median,
    processor_seconds,
    quantile,
    resident_bytes,
)

ENGINE = {"name": "fake", "plugin": "fake", "base_model": "fake/model"}
SMOKE = 0.02
"""Share of the futures that the short form sends."""
ECHO = """
from fastapi import FastAPI, Request
app = FastAPI()
@app.post("/echo")
async def echo(request: Request):
    return await request.json()
"""


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with http.post(url, json=body) as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def one_client(url: str, futures: int, latencies: list[float]) -> None:
    """Submit and fetch, one future after the other."""
    async with aiohttp.ClientSession(headers={"X-API-Key": KEY}) as http:
        session = (await post(http, f"{url}/api/v1/create_session", {}))["session_id"]
        run = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "fake/model",
            "lora_config": {"rank": 4},
        }
        created = await post(http, f"{url}/api/v1/create_model", run)
        await post(http, f"{url}/api/v1/retrieve_future", {"request_id": created["request_id"]})
        for number in range(1, futures + 1):
            step = {"model_id": created["model_id"], "seq_id": number, "adam_params": {"learning_rate": 1e-3}}
            started = time.perf_counter()
            promise = await post(http, f"{url}/api/v1/optim_step", step)
            result = await post(http, f"{url}/api/v1/retrieve_future", {"request_id": promise["request_id"]})
            latencies.append(time.perf_counter() - started)
            if "metrics" not in result:
                raise RuntimeError(f"no result: {result}")


async def load(url: str, clients: int, futures: int) -> dict[str, float]:
    """Several clients at once."""
    latencies: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(one_client(url, futures, latencies) for _ in range(clients)))
    seconds = time.perf_counter() - started
    return {
        "p50_ms": 1e3 * median(latencies),
        "p95_ms": 1e3 * quantile(latencies, 0.95),
        "per_second": clients * futures / seconds,
    }


async def echo_load(url: str, clients: int, pairs: int) -> dict[str, float]:
    """The floor: two echoes instead of submit and fetch."""
    latencies: list[float] = []

    async def one() -> None:
        async with aiohttp.ClientSession() as http:
            for number in range(pairs):
                started = time.perf_counter()
                await post(http, url, {"seq_id": number})
                await post(http, url, {"request_id": "x" * 60})
                latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - started
    return {"p50_ms": 1e3 * median(latencies), "per_second": clients * pairs / seconds}


def client_process(kind: str, url: str, clients: int, count: int) -> dict[str, float]:
    """Run a load in a process of its own, so that client and gateway do not share an interpreter."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.roundtrip",
        "--as-client",
        kind,
        url,
        str(clients),
        str(count),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    answer: dict[str, float] = json.loads(output.splitlines()[-1])
    return answer


def sdk_latency(url: str, futures: int) -> dict[str, float]:
    """The same future through the official SDK."""
    import tinker

    latencies = []
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4).result()
        for _ in range(futures):
            started = time.perf_counter()
            client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
            latencies.append(time.perf_counter() - started)
    return {"p50_ms": 1e3 * median(latencies)}


def measure(folder: Path, database_url: str | None, repeats: int, share: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with gateway(folder, ENGINE, database_url) as measured:
        client_process("futures", measured.url, 4, int(100 * share))  # warm-up
        for clients, count in ((1, int(500 * share)), (16, int(150 * share))):
            runs = []
            for _ in range(repeats):
                before = processor_seconds(measured.pid)
                run = client_process("futures", measured.url, clients, count)
                spent = processor_seconds(measured.pid) - before
                runs.append({**run, "gateway_cpu_ms": 1e3 * spent / (clients * count)})
            results[f"{clients} clients"] = {name: median([run[name] for run in runs]) for name in runs[0]}
        results["sdk"] = client_process("sdk", measured.url, 1, int(300 * share))
        results["gateway_resident_mb"] = resident_bytes(measured.pid) / 1e6
    return results


def measure_echo(folder: Path, repeats: int, share: float) -> dict[str, Any]:
    (folder / "echo_app.py").write_text(ECHO)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "echo_app:app", "--port", str(port), "--no-access-log"]
    log = subprocess.DEVNULL
    with subprocess.Popen([*command, "--app-dir", str(folder)], stdout=log, stderr=log) as server:
        time.sleep(3)
        url = f"http://127.0.0.1:{port}/echo"
        results = {}
        for clients in (1, 16):
            runs = [client_process("echo", url, clients, int(300 * share)) for _ in range(repeats)]
            results[f"{clients} clients"] = {name: median([run[name] for run in runs]) for name in runs[0]}
        server.terminate()
    return results


def as_client(kind: str, url: str, clients: int, count: int) -> None:
    """What a client process does: measure, and print the numbers as its last line."""
    if kind == "sdk":
        answer = sdk_latency(url, count)
    elif kind == "echo":
        answer = asyncio.run(echo_load(url, clients, count))
    else:
        answer = asyncio.run(load(url, clients, count))
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database-url", default=None, help="an empty Postgres database; SQLite if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    parser.add_argument("--as-client", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_client:
        kind, url, clients, count = args.as_client
        as_client(kind, url, int(clients), int(count))
        return
    repeats, share = (1, SMOKE) if args.smoke else (args.repeats, 1.0)
    store = "postgres" if args.database_url else "sqlite"
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "store": store,
            "future": measure(Path(folder), args.database_url, repeats, share),
            "echo": measure_echo(Path(folder), repeats, share),
        }
    keep(f"roundtrip-{store}", results, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
