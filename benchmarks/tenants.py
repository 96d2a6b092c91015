"""Many runs on one base model, in common passes, against one after the other.

    python -m benchmarks.tenants [--runs 16] [--repeats 9] [--models tandem/tiny …] [--smoke]

Every step trains each run on one sequence of its own: gradient and optimizer step. *Together* hands the engine all runs
in one call, *apart* one run a call, both without a gateway; *http* is all runs through the official SDK, HTTP, the
durable store and an engine process; *PEFT* is one model with as many adapters, `set_adapter` before each run's turn, an
AdamW for each. All begin at the same numbers, have the same number of threads, and must arrive at the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinker

from benchmarks.alternating import Side, alternate, disturbance, engine_process, ratios, summary
from benchmarks.measuring import KEY, RESULTS, gateway, keep, machine, median
from benchmarks.plain import ADAM, PlainProcess
from benchmarks.training import sdk_datum
from benchmarks.workload import LARGER, MODELS, TINY, Batch, model_folder, tenant_batches, vocabulary

RANK = 16
SEED = 7
DIFFERENT_STEPS = 8
LOSS_TOLERANCE = 1e-3
SPANS = {"64-256": (64, 256), "16-48": (16, 48)}
"""Lengths of the sequences, by the name of the measurement."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    runs: int = 16
    repeats: int = 9
    patience_s: float = 60.0
    spans: dict[str, tuple[int, int]] = field(default_factory=lambda: dict(SPANS))
    steps: dict[str, int] = field(default_factory=lambda: {TINY: 8, LARGER: 2})


SMOKE = Plan(runs=2, repeats=1, patience_s=0.0, spans={"4-9": (4, 9)}, steps=dict.fromkeys(MODELS, 1))


class Together:
    """The engine with all runs in one call, or with one call for each."""

    def __init__(self, engine: Any, name: str, steps: list[list[Batch]], *, apart: bool) -> None:
        from engines.interface import RunOperation
        from engines.operations import CreateRun, ForwardBackward, LoraSpec, OptimStep

        self.engine = engine
        self.apart = apart
        self.done = 0
        self.losses: list[float] = []
        names = [f"{name}{number}" for number in range(len(steps[0]))]
        specs = [LoraSpec(rank=RANK, seed=SEED + number) for number in range(len(names))]
        engine.create_runs(
            [RunOperation(run, CreateRun(spec)) for run, spec in zip(names, specs, strict=True)]
        )
        self.passes = [
            [
                RunOperation(
                    run, ForwardBackward([_datum(*row) for row in zip(*batch, strict=True)], "cross_entropy")
                )
                for run, batch in zip(names, step, strict=True)
            ]
            for step in steps
        ]
        self.steps = [RunOperation(run, OptimStep(**ADAM)) for run in names]

    def train(self, steps: int) -> float:
        """Seconds of so many steps of all runs."""
        started = time.perf_counter()
        for _ in range(steps):
            items = self.passes[self.done % len(self.passes)]
            self.done += 1
            for some in [[item] for item in items] if self.apart else [items]:
                self.losses += [result.metrics["loss:sum"] for result in self.engine.forward_backward(some)]
            self.engine.optim_step(self.steps)
        return time.perf_counter() - started


class Clients:
    """The runs as their users have them: one training client each, the next step on its way before the last one's
    results are read."""

    def __init__(self, service: tinker.ServiceClient, model: str, steps: list[list[Batch]]) -> None:
        self.clients = [
            service.create_lora_training_client(model, rank=RANK, seed=SEED + number).result()
            for number in range(len(steps[0]))
        ]
        self.passes = [[[sdk_datum(batch.inputs[0], batch.targets[0])] for batch in step] for step in steps]
        self.adam = tinker.AdamParams(**ADAM)
        self.done = 0
        self.losses: list[float] = []

    def train(self, steps: int) -> float:
        """Seconds of so many steps of all runs."""
        under_way: deque[list[tuple[Any, Any]]] = deque()
        started = time.perf_counter()
        for _ in range(steps):
            data = self.passes[self.done % len(self.passes)]
            self.done += 1
            under_way.append(
                [
                    (client.forward_backward(own, "cross_entropy"), client.optim_step(self.adam))
                    for client, own in zip(self.clients, data, strict=True)
                ]
            )
            if len(under_way) > 1:
                self._finish(under_way.popleft())
        self._finish(under_way.popleft())
        return time.perf_counter() - started

    def _finish(self, futures: list[tuple[Any, Any]]) -> None:
        for gradient, step in futures:
            self.losses.append(gradient.result().metrics["loss:sum"])
            step.result()


def _datum(inputs: Any, targets: Any) -> Any:
    import numpy as np

    from engines.operations import Datum
    from engines.tensors import Tensor

    wanted = {
        "target_tokens": Tensor.of(targets.astype(np.int64)),
        "weights": Tensor.of(np.ones(targets.shape, np.float32)),
    }
    return Datum(Tensor.of(inputs), wanted)


def measure(model: str, span: tuple[int, int], plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """All four ways of one model and one span of lengths."""
    from engines.hf import HfEngine
    from engines.interface import EngineConfig

    folder = model_folder(model, root)
    options = {"threads": threads, "device": "cpu"}
    engine = HfEngine.load(
        EngineConfig("bench", "hf", model, str(folder), ("train",), str(root / "storage"), 1, options)
    )
    steps = tenant_batches(vocabulary(folder), DIFFERENT_STEPS, plan.runs, *span)
    tokens = sum(batch.inputs.size for step in steps for batch in step) / len(steps)
    settings = {"threads": threads, "rank": RANK, "seed": SEED, "batches": DIFFERENT_STEPS}
    settings |= {"runs": plan.runs, "shortest": span[0], "longest": span[1]}
    count = plan.steps[model]
    losses: list[float] = []
    served = {"name": "engine", "base_model": model, "model": str(folder), "options": options}
    with (
        PlainProcess("tenants", folder, settings) as plain,
        tempfile.TemporaryDirectory(dir=root) as data,
        gateway(Path(data), served) as measured,
        tinker.ServiceClient(base_url=measured.url, api_key=KEY) as service,
    ):
        ours: dict[str, Together | Clients] = {
            "together": Together(engine, "together", steps, apart=False),
            "apart": Together(engine, "apart", steps, apart=True),
            "http": Clients(service, model, steps),
        }

        def train_with_peft() -> float:
            answer = plain.order(steps=count)
            losses.extend(answer["losses"])
            return count * tokens / float(answer["seconds"])

        processes = {"this": os.getpid(), "gateway": measured.pid, "engine": engine_process(measured.pid)}
        sides = {
            name: Side(lambda way=way: count * tokens / way.train(count), processes)  # type: ignore[misc]
            for name, way in ours.items()
        }
        sides["peft"] = Side(train_with_peft, {"loop": plain.pid})
        rounds = alternate(sides, plan.repeats, plan.patience_s)
    engine.close()
    pairs = [("together", "peft"), ("together", "apart"), ("http", "peft")]
    compared = {f"{one}_to_{other}": ratios(rounds, one, other) for one, other in pairs}
    return {
        "runs": plan.runs,
        **{name: summary((done[name] for done in rounds), count) for name in sides},
        "ratios": compared,
        "ratio": round(median(compared["together_to_peft"]), 4),
        "others": disturbance(rounds),
        "largest_difference_of_losses": max(difference(way.losses, losses) for way in ours.values()),
    }


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of the losses of the same runs and steps."""
    difference = max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))
    if not difference < LOSS_TOLERANCE:
        raise RuntimeError(f"the sides do not compute the same: their losses differ by {difference:.2g}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--runs", type=int, default=Plan.runs)
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument("--patience", type=float, default=Plan.patience_s, help="seconds to wait for calm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine and of PEFT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(args.runs, args.repeats, args.patience)
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK, "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            for name, span in plan.spans.items():
                measured = measure(model, span, plan, args.threads, Path(root))
                results["models"].setdefault(model, {})[name] = measured
                print(json.dumps({model: {name: measured}}, indent=1))
    keep("tenants", results, args.out)


if __name__ == "__main__":
    main()
