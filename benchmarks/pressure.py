"""Many samples in flight from one client, and what another client feels of it; numpy engine, durable store, HTTP.

    python -m benchmarks.pressure [--smoke]

One client submits 2,000 samples at once and waits for each with a request of its own, so that 2,000 requests are parked
in the gateway; once as a raw asyncio client, once with the official SDK. Another client meanwhile submits an optimizer
step and fetches its result, over and over, as it did when the gateway had nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.measuring import (
    KEY,
    RESULTS,
    Measured,
    gateway,
    keep,
    median,
    quantile,
    resident_bytes,
    threads_of,
)

SAMPLES = 2000
TOKENS = 32
STEP_S = 0.01
"""Seconds that each step of the engine takes longer: it stands for an engine that has something to compute."""
ENGINE = {"name": "fake", "plugin": "fake", "base_model": "fake/model", "options": {"delay_s": STEP_S}}
AT_A_TIME = 400
"""Submits under way together, as the SDK limits itself."""
ROUND_TRIPS = 100
_PROMPT = list(range(3, 35))


async def _post(http: aiohttp.ClientSession, route: str, body: dict[str, Any]) -> dict[str, Any]:
    async with http.post(f"/api/v1/{route}", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{route} is answered {response.status}: {await response.text()}")
        answer: dict[str, Any] = await response.json()
        return answer


async def _fulfilled(http: aiohttp.ClientSession, request_id: str) -> dict[str, Any]:
    while True:
        answer = await _post(http, "retrieve_future", {"request_id": request_id})
        if answer.get("type") != "try_again":
            return answer


def _client(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, headers={"X-API-Key": KEY}, connector=aiohttp.TCPConnector(limit=0))


async def raw_samples(url: str, count: int) -> dict[str, float]:
    """Submit that many samples and wait for all; how many have all their tokens."""
    async with _client(url) as http:
        session = (await _post(http, "create_session", {}))["session_id"]
        opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
        sampler = (await _post(http, "create_sampling_session", opened))["sampling_session_id"]
        limit = asyncio.Semaphore(AT_A_TIME)

        async def one(number: int) -> int:
            body = {
                "sampling_session_id": sampler,
                "seq_id": number,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": _PROMPT}]},
                "sampling_params": {"max_tokens": TOKENS, "seed": number, "stop": []},
            }
            async with limit:
                promise = await _post(http, "asample", body)
            result = await _fulfilled(http, promise["request_id"])
            return len(result["sequences"][0]["tokens"]) == TOKENS

        started = time.perf_counter()
        whole = await asyncio.gather(*(one(number) for number in range(count)))
        return {"answered": sum(whole), "seconds": time.perf_counter() - started}


def sdk_samples(url: str, count: int) -> dict[str, float]:
    """The same through the official SDK."""
    import tinker

    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model="fake/model").result()
        prompt = tinker.ModelInput.from_ints(_PROMPT)
        started = time.perf_counter()
        futures = [
            sampler.sample(prompt, 1, tinker.SamplingParams(max_tokens=TOKENS, seed=number, stop=[]))
            for number in range(count)
        ]
        whole = sum(len(future.result(timeout=300).sequences[0].tokens) == TOKENS for future in futures)
        return {"answered": whole, "seconds": time.perf_counter() - started}


async def round_trips(url: str, least: int, until: Path | None) -> list[float]:
    """Seconds of one future after the other, `least` of them, and more until a file is there."""
    latencies: list[float] = []
    async with _client(url) as http:
        session = (await _post(http, "create_session", {}))["session_id"]
        new = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "fake/model",
            "lora_config": {"rank": 4},
        }
        run = (await _post(http, "create_model", new))["model_id"]
        await _fulfilled(http, f"{run}:0")
        while len(latencies) < least or (until is not None and not await asyncio.to_thread(until.exists)):
            body = {"model_id": run, "seq_id": len(latencies) + 1, "adam_params": {"learning_rate": 1e-3}}
            started = time.perf_counter()
            await _fulfilled(http, (await _post(http, "optim_step", body))["request_id"])
            latencies.append(time.perf_counter() - started)
    return latencies


@contextmanager
def _process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own, so that it shares no interpreter with the gateway."""
    command = [sys.executable, "-m", "benchmarks.pressure", "--as-client", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise RuntimeError("a client of the benchmark failed; see above")
    return json.loads(output.splitlines()[-1])


class Watch:
    """The most memory and threads that a process has while this is in use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.bytes = self.threads = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, resident_bytes(self.pid))
            self.threads = max(self.threads, threads_of(self.pid))


def _milliseconds(latencies: list[float]) -> dict[str, float]:
    return {
        "smallest_ms": 1e3 * min(latencies),
        "p50_ms": 1e3 * median(latencies),
        "p95_ms": 1e3 * quantile(latencies, 0.95),
        "round_trips": len(latencies),
    }


def under_pressure(measured: Measured, folder: Path, kind: str, count: int) -> dict[str, Any]:
    """What one client's samples do to the gateway, and to another client."""
    done = folder / f"{kind}-is-done"
    before, threads = resident_bytes(measured.pid), threads_of(measured.pid)
    with (
        Watch(measured.pid) as watch,
        _process(kind, measured.url, count) as heavy,
        _process("round-trips", measured.url, 1, done) as other,
    ):
        samples = _answer(heavy)
        done.touch()
        latencies = _answer(other)
    return {
        **samples,
        "grown_mb": (watch.bytes - before) / 1e6,
        "threads_before": threads,
        "threads": watch.threads,
        "other": _milliseconds(latencies),
    }


def measure(folder: Path, samples: int, idle_round_trips: int) -> dict[str, Any]:
    """Idle, then under the raw client's samples, then under the SDK's."""
    with gateway(folder, ENGINE) as measured:
        with _process("round-trips", measured.url, idle_round_trips, "") as idle:
            results: dict[str, Any] = {"samples": samples, "idle": _milliseconds(_answer(idle))}
        for kind in ("raw", "sdk"):
            results[kind] = under_pressure(measured, folder, kind, samples)
    return results


def as_client(kind: str, url: str, count: int, until: str) -> None:
    """What a client process does: work, and print what it measured as its last line."""
    if kind == "raw":
        answer: Any = asyncio.run(raw_samples(url, count))
    elif kind == "sdk":
        answer = sdk_samples(url, count)
    else:
        answer = asyncio.run(round_trips(url, count, Path(until) if until else None))
    print(json.dumps(answer))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    parser.add_argument("--as-client", nargs="+", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_client:
        kind, url, count, *until = args.as_client
        as_client(kind, url, int(count), until[0] if until else "")
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = (60, 5) if args.smoke else (SAMPLES, ROUND_TRIPS)
        results = measure(Path(folder), *sizes)
    keep("pressure", results, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
