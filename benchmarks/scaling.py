"""Training speed of the engine as the work grows: with runs, with the length of sequences, with runs that are idle.

    python -m benchmarks.scaling [--seconds 1.5] [--smoke]

The built-in model, LoRA of rank 16, gradient and optimizer step, the engine alone. Each point is the best of the turns
that fit into its time, so that a moment in which the machine does something else does not look like a cliff.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tenants
from benchmarks.measuring import RESULTS, keep, machine
from benchmarks.workload import TINY, model_folder, tenant_batches, vocabulary

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Plan:
    """Where it is measured, and the seconds that a point may take."""

    seconds: float = 1.5
    runs: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    idle: tuple[int, ...] = (0, 10, 100, 300, 1000)


SMOKE = Plan(seconds=0.0, runs=(1, 2), lengths=(4, 8), idle=(0, 2))


class Engine:
    """An engine, and ever new runs in it."""

    def __init__(self, threads: int, root: Path) -> None:
        from engines.hf import HfEngine
        from engines.interface import EngineConfig

        folder = model_folder(TINY, root)
        options = {"threads": threads, "device": "cpu"}
        config = EngineConfig("bench", "hf", TINY, str(folder), ("train",), str(root / "storage"), 1, options)
        self.engine = HfEngine.load(config)
        self.vocabulary = vocabulary(folder)

    def rate(self, name: str, runs: int, length: int, seconds: float) -> float:
        """Tokens per second of so many new runs with a sequence each, which are dropped afterwards."""
        steps = tenant_batches(self.vocabulary, 2, runs, length, length)
        trained = tenants.Together(self.engine, name, steps, apart=False)
        trained.train(1)
        best = 0.0
        deadline = time.perf_counter() + seconds
        while not best or time.perf_counter() < deadline:
            best = max(best, runs * length / trained.train(1))
        for number in range(runs):
            self.engine.drop_run(f"{name}{number}")
        return round(best, 1)

    def idle(self, first: int, count: int) -> None:
        """Runs that have trained a step and then have nothing to do."""
        if count > first:
            steps = tenant_batches(self.vocabulary, 1, count - first, 4, 4)
            tenants.Together(self.engine, f"idle{first}-", steps, apart=False).train(1)


def measure(plan: Plan, threads: int, root: Path) -> dict[str, Points]:
    engine = Engine(threads, root)
    found: dict[str, Points] = {
        "runs": [(runs, engine.rate("runs", runs, 64, plan.seconds)) for runs in plan.runs],
        "length": [(length, engine.rate("length", 1, length, plan.seconds)) for length in plan.lengths],
        "idle": [],
    }
    there = 0
    for idle in plan.idle:
        engine.idle(there, idle)
        there = idle
        found["idle"].append((idle, engine.rate("busy", 4, 64, plan.seconds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a point")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(seconds=args.seconds)
    with tempfile.TemporaryDirectory() as root:
        results: dict[str, Any] = measure(plan, args.threads, Path(root))
    print(results)
    keep("scaling", {"machine": machine(), "threads": args.threads, **results}, args.out)


if __name__ == "__main__":
    main()
