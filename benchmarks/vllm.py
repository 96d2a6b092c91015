"""Tandem with its engine on vLLM against vLLM's own OpenAI server: the same requests, machine and run.

    python -m benchmarks.vllm PYTHON [--model random/qwen3-34m] [--repeats 5] [--smoke]

PYTHON is the interpreter of an environment that `python -m engines.vllm.environment` has made. Both serve the base
model with places for adapters, in float32, without compiling; requests are completions of token ids, sent by the same
client to one and then the other. Throughput: all requests at once. Latency: one token, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np

from benchmarks.measuring import KEY, RESULTS, free_port, gateway, keep, median, quantile
from benchmarks.workload import LARGER, MODELS, model_folder, vocabulary
from gateway.settings import engine_environment

CONTEXT = 512
ADAPTERS = 4
SLOTS = 64
GUESTS = 16
START_S = 300.0


def prompts(size: int, count: int, length: int) -> list[list[int]]:
    """Random tokens, another prompt for each request."""
    drawn = np.random.default_rng(0).integers(300, size, (count, length))
    found: list[list[int]] = drawn.tolist()
    return found


async def completion(http: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int) -> int:
    """One request; gives the number of tokens that it says were drawn."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": 7}
    async with http.post(f"{url}/v1/completions", json=body) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{url}: {answer}")
        count: int = answer["usage"]["completion_tokens"]
        return count


async def throughput(url: str, asked: list[list[int]], tokens: int) -> float:
    """Tokens in a second, all requests at once."""
    async with aiohttp.ClientSession(headers=HEADERS, timeout=PATIENCE) as http:
        started = time.perf_counter()
        drawn = await asyncio.gather(*(completion(http, url, prompt, tokens) for prompt in asked))
        return sum(drawn) / (time.perf_counter() - started)


async def latencies(url: str, asked: list[list[int]]) -> list[float]:
    """Milliseconds of requests for one token, one after the other."""
    found = []
    async with aiohttp.ClientSession(headers=HEADERS, timeout=PATIENCE) as http:
        for prompt in asked:
            started = time.perf_counter()
            await completion(http, url, prompt, 1)
            found.append(1000 * (time.perf_counter() - started))
    return found


HEADERS = {"Authorization": f"Bearer {KEY}"}
PATIENCE = aiohttp.ClientTimeout(total=600)


@contextmanager
def vllm_server(python: str, model: Path, folder: Path) -> Iterator[str]:
    """vLLM's own server, with what Tandem's engine asks of vLLM; its URL."""
    port = free_port()
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "m",
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT),
    ]
    command += ["--max-num-seqs", str(SLOTS + GUESTS), "--max-num-batched-tokens", "2048", "--enforce-eager"]
    command += ["--enable-lora", "--max-loras", str(ADAPTERS + 1), "--max-cpu-loras", str(ADAPTERS + 1)]
    command += ["--max-lora-rank", "64", "--disable-log-stats", "--disable-uvicorn-access-log"]
    command += ["--lora-target-modules", *"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()]
    environment = {
        **engine_environment(),  # how threads wait for each other is as in Tandem's engine
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _await_health(url, process, folder / "vllm.log")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=10).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise RuntimeError(f"vLLM's server did not become ready: {log.read_text()[-2000:]}")


def measure(urls: dict[str, str], size: int, repeats: int, share: float) -> dict[str, Any]:
    """Both in turn, so that what the machine does beside it meets both."""
    requests, tokens, single = max(4, int(32 * share)), max(8, int(64 * share)), max(5, int(60 * share))
    many, few = prompts(size, requests, 32), prompts(size, single, 32)
    found: dict[str, dict[str, list[float]]] = {name: {"tokens_s": [], "p50_ms": []} for name in urls}
    for url in urls.values():  # what is done once
        asyncio.run(throughput(url, many, tokens))
    for _ in range(repeats):
        for name, url in urls.items():
            found[name]["tokens_s"].append(asyncio.run(throughput(url, many, tokens)))
            found[name]["p50_ms"].append(quantile(asyncio.run(latencies(url, few)), 0.5))
    tandem, vllm = found["tandem"], found["vllm"]
    ratios = [ours / theirs for ours, theirs in zip(tandem["tokens_s"], vllm["tokens_s"], strict=True)]
    more = [ours - theirs for ours, theirs in zip(tandem["p50_ms"], vllm["p50_ms"], strict=True)]
    return {
        "requests": requests,
        "tokens": tokens,
        **found,
        "throughput_ratio": median(ratios),
        "latency_more_ms": median(more),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm", description=__doc__)
    parser.add_argument("python", help="interpreter that has vLLM")
    parser.add_argument("--model", choices=MODELS, default=LARGER)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a short form, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="tandem-") as place:
        folder = Path(place)
        model = model_folder(arguments.model, folder)
        options = {"dtype": "float32", "max_context": CONTEXT, "adapters": ADAPTERS, "sample_slots": SLOTS}
        engine = {
            "name": "m",
            "plugin": "vllm",
            "base_model": "m",
            "model": str(model),
            "python": arguments.python,
            "roles": ["sample"],
            "options": {**options, "eager": True},
        }
        with (
            vllm_server(arguments.python, model, folder) as theirs,
            gateway(folder, engine, engine_silence_s="60") as ours,
        ):
            urls = {"tandem": ours.url, "vllm": theirs}
            share, repeats = (0.1, 1) if arguments.smoke else (1.0, arguments.repeats)
            results = measure(urls, vocabulary(model), repeats, share)
    results["model"] = arguments.model
    keep("vllm", results, arguments.out)
    print(
        f"{arguments.model}: {median(results['tandem']['tokens_s']):.0f} tokens/s, vLLM's server "
        f"{median(results['vllm']['tokens_s']):.0f}: {results['throughput_ratio']:.2f}; one token "
        f"{median(results['tandem']['p50_ms']):.1f} ms, {results['latency_more_ms']:+.1f} ms"
    )


if __name__ == "__main__":
    main()
