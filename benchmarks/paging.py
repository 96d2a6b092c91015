"""Many runs through an engine that has memory for few, against few runs that stay in memory and do the same work.

    python -m benchmarks.paging [--runs 64] [--places 8] [--repeats 3] [--smoke]

Every run has a client with two steps under way. On one side 64 runs take so many steps each, on an engine with room for
8 runs; on the other 8 runs take 8 times as many on an engine that holds them all. Both sides are the built-in model,
and every run of the first side must arrive at the losses and weights of a twin that was never out of memory. A few
minutes on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
from safetensors.numpy import load_file

from benchmarks.alternating import Side, alternate, disturbance, engine_process, ratios, summary
from benchmarks.measuring import KEY, RESULTS, Measured, gateway, keep, machine, median
from benchmarks.training import RANK, SdkLoop
from benchmarks.workload import TINY, Batch, Shape, model_folder, shaped_batches, vocabulary

TOLERANCE = 1e-5
"""Relative, between the losses of a run that was paged and of its twin that was not. For weights: relative to the
largest one of a tensor."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    runs: int = 64
    places: int = 8
    steps: int = 3
    rows: int = 8
    length: int = 128
    repeats: int = 3
    patience_s: float = 60.0

    @property
    def tokens(self) -> int:
        """Of one repeat, on each side."""
        return self.runs * self.steps * self.rows * self.length


SMOKE = Plan(runs=4, places=2, steps=2, rows=2, length=16, repeats=2, patience_s=0.0)


class Crowd:
    """Runs that train at the same time, each by a client of its own."""

    def __init__(self, service: tinker.ServiceClient, batches: list[list[Batch]], runs: int) -> None:
        self.pool = ThreadPoolExecutor(runs)
        self.loops = list(self.pool.map(lambda _: SdkLoop(service, TINY, batches), range(runs)))

    def train(self, steps: int) -> float:
        """Seconds until each has taken so many steps."""
        started = time.perf_counter()
        list(self.pool.map(lambda loop: loop.train(steps), self.loops))
        return time.perf_counter() - started


def counters(measured: Measured) -> dict[str, float]:
    """What the gateway says of its engine's memory."""
    answer = httpx.get(f"{measured.url}/admin/v1/engines", headers={"X-API-Key": KEY}, timeout=60)
    [engine] = answer.json()["items"]
    names = ("resident_runs", "run_bytes", "run_memory_bytes", "evictions", "restores")
    return {name: engine[name] for name in names}


def run_bytes(root: Path, engine: dict[str, Any], batches: list[list[Batch]]) -> int:
    """What one run occupies, by the engine's account."""
    with gateway(root, engine) as measured, service_of(measured) as service:
        SdkLoop(service, TINY, batches)
        return int(counters(measured)["run_bytes"])


def service_of(measured: Measured) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=measured.url, api_key=KEY)


def measure(plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """Both sides, in turn."""
    folder = model_folder(TINY, root)
    batches = shaped_batches(vocabulary(folder), 8, Shape(plan.rows, plan.length, plan.length))
    options = {"threads": threads, "device": "cpu"}
    engine = {"name": "engine", "base_model": TINY, "model": str(folder), "options": options}
    for name in ("size", "paging", "resident"):
        (root / name).mkdir()
    size = run_bytes(root / "size", engine, batches)
    small = {**engine, "run_memory_bytes": plan.places * size}
    with (
        gateway(root / "paging", small) as paging,
        gateway(root / "resident", engine) as resident,
        service_of(paging) as many_clients,
        service_of(resident) as few_clients,
    ):
        many, few = Crowd(many_clients, batches, plan.runs), Crowd(few_clients, batches, plan.places)
        times = plan.runs // plan.places
        sides = {
            "paging": Side(lambda: plan.tokens / many.train(plan.steps), _processes(paging)),
            "resident": Side(lambda: plan.tokens / few.train(plan.steps * times), _processes(resident)),
        }
        rounds = alternate(sides, plan.repeats, plan.patience_s)
        counted = counters(paging)
        twin = SdkLoop(few_clients, TINY, batches)
        twin.train(many.loops[0].done)
        for loop in (twin, *many.loops):
            loop.client.save_state("end").result()
    both = ratios(rounds, "paging", "resident")
    return {
        "run_bytes": size,
        **{name: summary((done[name] for done in rounds), plan.runs * plan.steps) for name in sides},
        "ratios": both,
        "ratio": round(median(both), 4),
        "others": disturbance(rounds),
        "counters": counted,
        "weights_compared": len(_saved(root / "paging")),
        "largest_difference_of_losses": _compare(many.loops, twin),
        "largest_difference_of_weights": _compare_weights(_saved(root / "paging"), _saved(root / "resident")),
    }


def _processes(measured: Measured) -> dict[str, int]:
    return {"client": os.getpid(), "gateway": measured.pid, "engine": engine_process(measured.pid)}


def _saved(root: Path) -> list[Path]:
    """The adapters that a gateway's runs have saved."""
    return sorted(root.glob("storage/checkpoints/*/adapter_model.safetensors"))


def _compare(paged: Sequence[SdkLoop], twin: SdkLoop) -> float:
    """All runs have the same seed and data: the largest relative difference from one that was never paged."""
    pairs = [pair for loop in paged for pair in zip(loop.losses, twin.losses, strict=True)]
    return _checked("losses", max(abs(mine - other) / abs(other) for mine, other in pairs))


def _compare_weights(paged: Sequence[Path], twins: Sequence[Path]) -> float:
    """The largest difference of a number, relative to the largest one of its tensor."""
    [expected] = [load_file(path) for path in twins]
    differences: list[float] = []
    for path in paged:
        weights = load_file(path)
        if weights.keys() != expected.keys():
            raise RuntimeError("a paged run has saved other tensors than its twin")
        for name, tensor in expected.items():
            scale = float(np.abs(tensor).max()) or 1.0
            differences.append(float(np.abs(weights[name] - tensor).max()) / scale)
    return _checked("weights", max(differences))


def _checked(what: str, difference: float) -> float:
    if not difference < TOLERANCE:
        raise RuntimeError(f"paged runs do not compute the same: their {what} differ by {difference:.2g}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=Plan.runs)
    parser.add_argument("--places", type=int, default=Plan.places)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each run, in each repeat")
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument("--patience", type=float, default=Plan.patience_s, help="seconds to wait for calm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engines")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = Plan(args.runs, args.places, args.steps, repeats=args.repeats, patience_s=args.patience)
    plan = SMOKE if args.smoke else plan
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK}
    results |= {
        "runs": plan.runs,
        "places": plan.places,
        "steps": plan.steps,
        "batch": [plan.rows, plan.length],
    }
    with tempfile.TemporaryDirectory() as root:
        results |= measure(plan, args.threads, Path(root))
    speeds = {name: median(results[name]["tokens_per_second"]) for name in ("paging", "resident")}
    print(
        f"{plan.runs} runs on memory for {plan.places}: {speeds['paging']:.0f} tokens/s; {plan.places} runs that stay: "
        f"{speeds['resident']:.0f}; ratio {results['ratio']:.3f}; at the end weights differ from a twin's by "
        f"{results['largest_difference_of_weights']:.2g} at most"
    )
    keep("paging", results, args.out)


if __name__ == "__main__":
    main()
