"""How much a database grows by a thousand training steps, with everything kept and with what is over deleted.

    python -m benchmarks.growth [--smoke]

A client trains one run, passes of 8 sequences of 128 tokens with an optimizer step after each, and draws a sample after
each step (numpy engine, SQLite). Bytes are those of pages in use, counted when the gateway has stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from benchmarks.measuring import KEY, RESULTS, gateway, keep
from benchmarks.roundtrip import ENGINE, post

SEQUENCES, LENGTH = 8, 128
KEPT = {"result_retention_s": "1e9", "future_retention_s": "1e9"}
DELETED = {"result_retention_s": "1", "future_retention_s": "1", "duty_s": "1"}
DUTIES = ("old results", "old calls")


async def train(url: str, steps: int) -> None:
    """A pass, a step and a sample, over and over."""
    async with aiohttp.ClientSession(headers={"X-API-Key": KEY}) as http:

        async def call(route: str, **body: Any) -> dict[str, Any]:
            promise = await post(http, f"{url}/api/v1/{route}", body)
            outcome = await post(http, f"{url}/api/v1/retrieve_future", {"request_id": promise["request_id"]})
            if "error" in outcome or outcome.get("type") == "try_again":
                raise RuntimeError(f"{route}: {outcome}")
            return promise

        session = (await post(http, f"{url}/api/v1/create_session", {}))["session_id"]
        about = {"session_id": session, "base_model": "fake/model"}
        run = (await call("create_model", model_seq_id=0, lora_config={"rank": 4}, **about))["model_id"]
        made = await post(
            http, f"{url}/api/v1/create_sampling_session", {"sampling_session_seq_id": 0, **about}
        )
        prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(LENGTH))}]}
        for step in range(steps):
            given = {"data": [_datum(step, index) for index in range(SEQUENCES)], "loss_fn": "cross_entropy"}
            await call("forward_backward", model_id=run, seq_id=2 * step + 1, forward_backward_input=given)
            await call("optim_step", model_id=run, seq_id=2 * step + 2, adam_params={"learning_rate": 1e-4})
            await call(
                "asample",
                sampling_session_id=made["sampling_session_id"],
                seq_id=step,
                prompt=prompt,
                sampling_params={"max_tokens": 16},
            )


def _datum(step: int, index: int) -> dict[str, Any]:
    tokens = [(step * 31 + index * 17 + place * 7) % 250 for place in range(LENGTH + 1)]
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64"},
            "weights": {"data": [1.0] * LENGTH, "dtype": "float32"},
        },
    }


def grown(steps: int, settings: dict[str, str]) -> dict[str, float]:
    """Bytes in use after so many steps, above those of an empty database, and the file's size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gateway(folder, ENGINE, None, **settings):
            pass
        empty, _ = _bytes(folder)
        with gateway(folder, ENGINE, None, **settings) as served:
            asyncio.run(train(served.url, steps))
            if "duty_s" in settings:
                _two_rounds(served.url)
        used, size = _bytes(folder)
        return {"used": used - empty, "file": size}


def _two_rounds(url: str) -> None:
    """Returns when each duty has begun and ended after everything was over."""
    time.sleep(2)
    before = _runs(url)
    while any(now < then + 2 for now, then in zip(_runs(url), before, strict=True)):
        time.sleep(0.2)


def _runs(url: str) -> list[int]:
    answer = httpx.get(f"{url}/admin/v1/duties", headers={"X-API-Key": KEY}, timeout=30, trust_env=False)
    return [duty["runs"] for duty in answer.json()["items"] if duty["name"] in DUTIES]


def _bytes(folder: Path) -> tuple[int, int]:
    """In use, and in all."""
    with closing(sqlite3.connect(folder / "tandem.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages, free, size = (
            connection.execute(f"PRAGMA {what}").fetchone()[0]
            for what in ("page_count", "freelist_count", "page_size")
        )
    return (pages - free) * size, pages * size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    steps = 20 if args.smoke else args.steps
    results = {"steps": steps, "kept": grown(steps, KEPT), "deleted": grown(steps, DELETED)}
    keep("growth", results, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
