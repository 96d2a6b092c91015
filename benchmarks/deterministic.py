"""What deterministic mode costs: training without it against training with it.

    python -m benchmarks.deterministic [--repeats 7] [--models tandem/tiny …] [--smoke]

Two engines in one process, which differ in their option `deterministic` alone, train the same runs in turn: gradient
and optimizer step, LoRA of rank 16, each run on one sequence of its own of 64 to 256 tokens. Once 16 runs, which go
together without the mode and have passes of their own in it, and once a single run. Both arrive at the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternating import Side, alternate, disturbance, ratios, summary
from benchmarks.measuring import RESULTS, keep, machine, median
from benchmarks.tenants import DIFFERENT_STEPS, RANK, Together, difference
from benchmarks.workload import LARGER, MODELS, TINY, model_folder, tenant_batches, vocabulary

NAME = "deterministic"
SIDES = {"default": False, "deterministic": True}
"""The ways, and the option of each."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    runs: tuple[int, ...] = (16, 1)
    repeats: int = 7
    patience_s: float = 45.0
    span: tuple[int, int] = (64, 256)
    tokens: dict[str, int] = field(default_factory=lambda: {TINY: 20_000, LARGER: 2_500})
    """How many a turn trains at least."""


SMOKE = Plan(runs=(2, 1), repeats=1, patience_s=0.0, span=(4, 9), tokens=dict.fromkeys(MODELS, 1))


def load(model: str, folder: Path, threads: int, storage: Path) -> dict[str, Any]:
    """An engine for each way."""
    from engines.hf import HfEngine
    from engines.interface import EngineConfig

    options = {"threads": threads, "device": "cpu"}
    return {
        name: HfEngine.load(
            EngineConfig(
                name, "hf", model, str(folder), ("train",), str(storage), 1, options | {"deterministic": mode}
            )
        )
        for name, mode in SIDES.items()
    }


def measure(engines: dict[str, Any], folder: Path, runs: int, plan: Plan, model: str) -> dict[str, Any]:
    """Both ways with so many runs."""
    steps = tenant_batches(vocabulary(folder), DIFFERENT_STEPS, runs, *plan.span)
    tokens = sum(batch.inputs.size for step in steps for batch in step) / len(steps)
    count = max(1, round(plan.tokens[model] / tokens))
    ways = {name: Together(engine, f"{runs}-", steps, apart=False) for name, engine in engines.items()}

    def train(name: str) -> float:
        import torch

        torch.use_deterministic_algorithms(
            SIDES[name], warn_only=True
        )  # as its engine has it in its own process
        return count * tokens / ways[name].train(count)

    own = {"this": os.getpid()}
    sides = {name: Side(lambda name=name: train(name), own) for name in ways}  # type: ignore[misc]
    rounds = alternate(sides, plan.repeats, plan.patience_s)
    for engine in engines.values():
        for number in range(runs):
            engine.drop_run(f"{runs}-{number}")
    compared = ratios(rounds, "default", "deterministic")
    return {
        **{name: summary((done[name] for done in rounds), count) for name in sides},
        "ratios": compared,
        "ratio": round(median(compared), 4),
        "others": disturbance(rounds),
        "largest_difference_of_losses": difference(*(way.losses for way in ways.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument("--patience", type=float, default=Plan.patience_s, help="seconds to wait for calm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(repeats=args.repeats, patience_s=args.patience)
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK, "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            folder = model_folder(model, Path(root))
            engines = load(model, folder, args.threads, Path(root) / "storage")
            found = {str(runs): measure(engines, folder, runs, plan, model) for runs in plan.runs}
            for engine in engines.values():
                engine.close()
            results["models"][model] = found
            print(json.dumps({model: found}, indent=1))
    keep(NAME, results, args.out)


if __name__ == "__main__":
    main()
