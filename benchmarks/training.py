"""LoRA training through HTTP, the durable store and an engine process, against a plain loop with PEFT.

    python -m benchmarks.training [--repeats 15] [--models tandem/tiny …] [--batches "8 × 512" …] [--smoke]

Tandem's side is the official SDK: gradient and optimizer step are submitted together, and the next step is on its way
before the result of the last one is read. The plain side is a loop in one process: PEFT on the same model, the same
adapter, data and optimizer settings, `torch.optim.AdamW`; it pads sequences of different lengths to the longest. Both
have the same number of threads, work in turn, and must arrive at the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinker

from benchmarks.alternating import Round, Side, alternate, disturbance, engine_process, ratios, summary
from benchmarks.measuring import KEY, RESULTS, gateway, keep, machine, median
from benchmarks.plain import ADAM, PlainProcess
from benchmarks.workload import LARGER, MODELS, TINY, Batch, Shape, model_folder, shaped_batches, vocabulary

RANK = 16
SEED = 7
DIFFERENT_BATCHES = 8
LOSS_TOLERANCE = 1e-2
"""Relative, between the two loops' losses: above it they do not do the same work."""
SHAPES = {"8 × 128": Shape(8, 128, 128), "8 × 512": Shape(8, 512, 512), "8 × 16–512": Shape(8, 16, 512)}
"""What one step takes, by the name of the measurement."""


@dataclass(frozen=True)
class Plan:
    """How much is measured: of each model, steps a repeat of some shapes. A repeat takes a few seconds, so that the
    empty pipeline at its ends counts for little."""

    repeats: int = 15
    patience_s: float = 600.0
    shapes: dict[str, Shape] = field(default_factory=lambda: dict(SHAPES))
    steps: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            TINY: {"8 × 128": 50},
            LARGER: {"8 × 128": 3, "8 × 512": 1, "8 × 16–512": 2},
        }
    )


_SHORT = {"2 × 16": Shape(2, 16, 16), "2 × 4–16": Shape(2, 4, 16)}
SMOKE = Plan(
    repeats=2,
    patience_s=0.0,
    shapes=_SHORT,
    steps=dict.fromkeys(MODELS, dict.fromkeys(_SHORT, 2)),
)


class SdkLoop:
    """Training as a user of the SDK does it."""

    def __init__(self, service: tinker.ServiceClient, model: str, steps: Sequence[Sequence[Batch]]) -> None:
        """Each step takes all rows of some batches."""
        self.client = service.create_lora_training_client(model, rank=RANK, seed=SEED).result()
        self.batches = [
            [sdk_datum(*row) for batch in step for row in zip(*batch, strict=True)] for step in steps
        ]
        self.adam = tinker.AdamParams(**ADAM)
        self.done = 0
        self.losses: list[float] = []

    def train(self, steps: int) -> float:
        """Seconds of so many steps."""
        under_way: deque[tuple[Any, Any]] = deque()
        started = time.perf_counter()
        for _ in range(steps):
            batch = self.batches[self.done % len(self.batches)]
            under_way.append(
                (self.client.forward_backward(batch, "cross_entropy"), self.client.optim_step(self.adam))
            )
            self.done += 1
            if len(under_way) > 1:
                self._finish(*under_way.popleft())
        self._finish(*under_way.popleft())
        return time.perf_counter() - started

    def _finish(self, forward_backward: Any, optim_step: Any) -> None:
        self.losses.append(forward_backward.result().metrics["loss:sum"])
        optim_step.result()


def sdk_datum(inputs: Any, targets: Any) -> tinker.Datum:
    """Each token of `targets` is predicted, with weight 1."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(inputs.tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=targets.tolist(), dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * len(targets), dtype="float32"),
        },
    )


def measure(model: str, shape: Shape, steps: int, plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """Both sides of one model and one shape of its steps."""
    folder = model_folder(model, root)
    options = {"threads": threads, "device": "cpu"}
    engine = {"name": "engine", "base_model": model, "model": str(folder), "options": options}
    different = min(steps, DIFFERENT_BATCHES)
    settings = {"threads": threads, "rank": RANK, "seed": SEED, "batches": different, **shape._asdict()}
    batches = shaped_batches(vocabulary(folder), different, shape)
    lengths = [[row.size for batch in step for row in batch.inputs] for step in batches]
    tokens = sum(map(sum, lengths)) / different
    plain_losses: list[float] = []
    with (
        PlainProcess("train", folder, settings) as plain,
        tempfile.TemporaryDirectory(dir=root) as data,
        gateway(Path(data), engine) as measured,
        tinker.ServiceClient(base_url=measured.url, api_key=KEY) as service,
    ):
        loop = SdkLoop(service, model, batches)

        def train_plainly() -> float:
            answer = plain.order(steps=steps)
            plain_losses.extend(answer["losses"])
            return steps * tokens / float(answer["seconds"])

        processes = {"client": os.getpid(), "gateway": measured.pid, "engine": engine_process(measured.pid)}
        sides = {
            "tandem": Side(lambda: steps * tokens / loop.train(steps), processes),
            "plain": Side(train_plainly, {"loop": plain.pid}),
        }
        rounds = alternate(sides, plan.repeats, plan.patience_s)
        parameters = plain.parameters
    both = ratios(rounds, "tandem", "plain")
    return {
        "parameters": parameters,
        "steps_per_repeat": steps,
        "tokens_a_step": tokens,
        "padding": round(median([len(some) * max(some) / sum(some) for some in lengths]), 4),
        **{name: summary((done[name] for done in rounds), steps) for name in sides},
        "gateway_share": gateway_share(rounds, steps * tokens),
        "ratios": both,
        "ratio": round(median(both), 4),
        "others": disturbance(rounds),
        "largest_difference_of_losses": _compare(loop.losses, plain_losses),
    }


def gateway_share(rounds: Sequence[Round], tokens: float) -> float:
    """The gateway's processor time for each second that so many tokens took; its processor is one of several."""
    return round(
        median([done["tandem"].spent["gateway"] * done["tandem"].rate / tokens for done in rounds]), 5
    )


def _compare(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of the losses of the same steps."""
    difference = max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))
    if not difference < LOSS_TOLERANCE:
        raise RuntimeError(
            f"the two loops do not compute the same: their losses differ by {difference:.2g}, relatively"
        )
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", help="only these, of " + ", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument(
        "--patience",
        type=float,
        default=Plan.patience_s,
        help="seconds to wait for a calm machine, each model",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the engine and of the plain loop"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(repeats=args.repeats, patience_s=args.patience)
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK, "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            for name, steps in plan.steps[model].items():
                if args.batches is None or name in args.batches:
                    measured = measure(model, plan.shapes[name], steps, plan, args.threads, Path(root))
                    results["models"].setdefault(model, {})[name] = measured
                    print(json.dumps({model: {name: measured}}, indent=1))
    keep("training", results, args.out)


if __name__ == "__main__":
    main()
