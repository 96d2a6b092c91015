"""Training and sampling on one engine at the same time, with different shares for sampling.

    python -m benchmarks.sharing [--seconds 6] [--smoke]

One client of the official SDK trains a run, another samples 16 prompts of the base model over and over: each alone,
then both, with the setting `sampling_share` at a quarter, a half and three quarters. It divides the engine's time; both
use gateway, database and clients as well, which it does not divide.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tinker

from benchmarks.measuring import KEY, RESULTS, gateway, keep, machine
from benchmarks.training import DIFFERENT_BATCHES, SdkLoop
from benchmarks.ways_to_sample import ThroughGateway
from benchmarks.workload import TINY, Shape, model_folder, prompts, shaped_batches, vocabulary


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    seconds: float = 6.0
    rows: int = 8
    length: int = 128
    prompts: int = 16
    new_tokens: int = 32


SMOKE = Plan(shares=(0.5,), seconds=0.5, rows=2, length=16, prompts=2, new_tokens=4)


class Repeated:
    """A piece of work over and over until some time is over, counted in its units."""

    def __init__(self, work: Callable[[], int], seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.rate = 0.0

    def run(self) -> None:
        """Sets the units per second."""
        started, done = time.perf_counter(), 0
        while time.perf_counter() < started + self.seconds:
            done += self.work()
        self.rate = done / (time.perf_counter() - started)


def measure(share: float, plan: Plan, threads: int, root: Path) -> dict[str, float]:
    """What is left of either's speed beside the other, with one share."""
    folder = model_folder(TINY, root)
    data = root / f"gateway-{share}"
    data.mkdir()
    engine: dict[str, Any] = {"name": "engine", "base_model": TINY, "model": str(folder)}
    engine |= {"options": {"threads": threads, "device": "cpu"}, "sampling_share": share}
    with (
        gateway(data, engine) as measured,
        tinker.ServiceClient(base_url=measured.url, api_key=KEY) as service,
    ):
        shape = Shape(plan.rows, plan.length, plan.length)
        batches = shaped_batches(vocabulary(folder), DIFFERENT_BATCHES, shape)
        trainer = SdkLoop(service, TINY, batches)
        sampler = ThroughGateway(
            [service.create_sampling_client(base_model=TINY).result()],
            prompts(vocabulary(folder), plan.prompts, 16, 64),
            plan.new_tokens,
        )

        def train() -> int:
            trainer.train(2)
            return 2 * plan.rows * plan.length

        def sample() -> int:
            sampler.rate()
            return sum(map(len, sampler.tokens.values()))

        train(), sample()
        return _compare(train, sample, plan.seconds)


def _compare(train: Callable[[], int], sample: Callable[[], int], seconds: float) -> dict[str, float]:
    alone, beside = (
        {"training": Repeated(train, seconds), "sampling": Repeated(sample, seconds)} for _ in range(2)
    )
    for one in alone.values():
        one.run()
    threads = [threading.Thread(target=one.run, daemon=True) for one in beside.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds + 120)
    found = {f"{name}_alone": round(one.rate, 1) for name, one in alone.items()}
    found |= {f"{name}_beside": round(one.rate, 1) for name, one in beside.items()}
    if not all(found.values()):
        raise RuntimeError(f"one of the two has not finished anything: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(seconds=args.seconds)
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": args.threads,
        "work": asdict(plan),
        "shares": {},
    }
    with tempfile.TemporaryDirectory() as root:
        for share in plan.shares:
            results["shares"][str(share)] = measure(share, plan, args.threads, Path(root))
            print(json.dumps({share: results["shares"][str(share)]}))
    keep("sharing", results, args.out)


if __name__ == "__main__":
    main()
