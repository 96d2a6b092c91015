"""Sampling of many prompts at once through HTTP and the durable store, against `generate` of Transformers.

    python -m benchmarks.sampling [--repeats 7] [--models tandem/tiny …] [--smoke]

Tandem's side is the official SDK: every prompt is a `sample` of its own, submitted at once, without an early stop;
once of the base model and once of a run's adapter. The other side is `generate` on the base model in one process:
prompt by prompt, as a service without batching would, and, for information, all prompts in one batch that is padded
on the left. All are greedy, have the same number of threads and work in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tinker

from benchmarks.alternating import Side, alternate, disturbance, engine_process, ratios, summary
from benchmarks.measuring import KEY, RESULTS, gateway, keep, machine, median
from benchmarks.plain import PlainProcess
from benchmarks.workload import MODELS, model_folder, prompts, vocabulary

RANK = 16


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    prompts: int = 16
    shortest: int = 16
    longest: int = 64
    new_tokens: int = 48
    repeats: int = 7
    patience_s: float = 600.0

    @property
    def tokens(self) -> int:
        """New tokens of one repeat."""
        return self.prompts * self.new_tokens


SMOKE = Plan(prompts=3, shortest=4, longest=9, new_tokens=5, repeats=2, patience_s=0.0)


class Sampled:
    """All prompts at once through the SDK, and what came back last."""

    def __init__(self, client: tinker.SamplingClient, asked: list[list[int]], plan: Plan) -> None:
        self.client = client
        self.prompts = [tinker.ModelInput.from_ints(prompt) for prompt in asked]
        self.params = tinker.SamplingParams(max_tokens=plan.new_tokens, temperature=0.0, stop=[])
        self.tokens: list[list[int]] = []

    def rate(self) -> float:
        """New tokens per second."""
        started = time.perf_counter()
        futures = [
            self.client.sample(prompt, num_samples=1, sampling_params=self.params) for prompt in self.prompts
        ]
        self.tokens = [list(future.result().sequences[0].tokens) for future in futures]
        return sum(map(len, self.tokens)) / (time.perf_counter() - started)


class Generated:
    """The same through `generate`."""

    def __init__(self, plain: PlainProcess, batched: bool) -> None:
        self.plain = plain
        self.batched = batched
        self.tokens: list[list[int]] = []

    def rate(self) -> float:
        """New tokens per second."""
        answer = self.plain.order(batched=self.batched)
        self.tokens = answer["tokens"]
        return sum(map(len, self.tokens)) / float(answer["seconds"])


def measure(model: str, plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """All ways of one model."""
    folder = model_folder(model, root)
    data = root / f"gateway-{model.replace('/', '-')}"
    data.mkdir()
    options = {"threads": threads, "device": "cpu"}
    engine = {"name": "engine", "base_model": model, "model": str(folder), "options": options}
    settings = {"threads": threads, **asdict(plan)}
    with (
        PlainProcess("generate", folder, settings) as plain,
        gateway(data, engine) as measured,
        tinker.ServiceClient(base_url=measured.url, api_key=KEY) as service,
    ):
        asked = prompts(vocabulary(folder), plan.prompts, plan.shortest, plan.longest)
        base = Sampled(service.create_sampling_client(base_model=model).result(), asked, plan)
        run = service.create_lora_training_client(model, rank=RANK).result()
        adapted = Sampled(run.save_weights_and_get_sampling_client().result(), asked, plan)
        one_by_one, batch = Generated(plain, batched=False), Generated(plain, batched=True)
        processes = {"client": os.getpid(), "gateway": measured.pid, "engine": engine_process(measured.pid)}
        sides = {
            "tandem": Side(base.rate, processes),
            "tandem_adapter": Side(adapted.rate, processes),
            "one_by_one": Side(one_by_one.rate, {"generate": plain.pid}),
            "batch": Side(batch.rate, {"generate": plain.pid}),
        }
        rounds = alternate(sides, plan.repeats, plan.patience_s)
        parameters = plain.parameters
    for way in (base, adapted, one_by_one, batch):
        if sum(map(len, way.tokens)) != plan.tokens:
            raise RuntimeError(f"{plan.tokens} tokens were asked for, and {sum(map(len, way.tokens))} came")
    compared = {
        f"{ours}_to_{theirs}": ratios(rounds, ours, theirs)
        for ours in ("tandem", "tandem_adapter")
        for theirs in ("one_by_one", "batch")
    }
    return {
        "parameters": parameters,
        **{name: summary((done[name] for done in rounds), plan.tokens) for name in sides},
        "ratios": compared,
        "ratio": round(median(compared["tandem_to_one_by_one"]), 4),
        "others": disturbance(rounds),
        "same_tokens": _agreement(base.tokens, one_by_one.tokens),
    }


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the prompts that both continue with the same tokens."""
    return sum(mine == other for mine, other in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument(
        "--patience",
        type=float,
        default=Plan.patience_s,
        help="seconds to wait for a calm machine, each model",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine and of generate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(repeats=args.repeats, patience_s=args.patience)
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK}
    results |= {"work": asdict(plan), "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            results["models"][model] = measure(model, plan, args.threads, Path(root))
            print(json.dumps({model: results["models"][model]}, indent=1))
    keep("sampling", results, args.out)


if __name__ == "__main__":
    main()
