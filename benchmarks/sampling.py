"""Sampling of many prompts at once, through HTTP and by the engine alone, against Transformers.

    python -m benchmarks.sampling [--repeats 4] [--models tandem/tiny …] [--smoke]

Each prompt is a `sample` of its own, all submitted at once, without an early stop: of the base model, and of four
adapters in turn, mixed in one batch. *Through HTTP* is the official SDK, *engine* the engine in this process. The other
side is the base model in one process: `generate` prompt by prompt, as a service without batching would; on all prompts
in one batch that is padded on the left; and Transformers' own continuous batching. All are greedy, have the same number
of threads and work in turn. Then the speed with 1 to 64 prompts at once.

Tokens are compared with those of `generate`, for adapters through PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tinker

from benchmarks.alternating import Side, alternate, disturbance, engine_process, ratios, summary
from benchmarks.measuring import KEY, RESULTS, Measured, gateway, keep, machine, median
from benchmarks.plain import PlainProcess
from benchmarks.ways_to_sample import EngineAlone, Generated, ThroughGateway, agreement, with_peft
from benchmarks.workload import MODELS, model_folder, prompts, random_adapters, vocabulary
from sdk.admin import AdminClient

RANK = 16
ADAPTERS = 4
OURS = ("http", "http_adapters", "engine", "engine_adapters")
THEIRS = ("one_by_one", "batch", "continuous")


@dataclass(frozen=True)
class Plan:
    """How much is measured. `share`: a repeat of one by one continues so many of all prompts, others each time."""

    prompts: int = 16
    shortest: int = 16
    longest: int = 64
    new_tokens: int = 48
    repeats: int = 4
    share: int = 4
    at_once: tuple[int, ...] = (1, 4, 16, 64)
    curve_repeats: int = 2
    patience_s: float = 30.0


SMOKE = Plan(
    prompts=4,
    shortest=4,
    longest=9,
    new_tokens=5,
    repeats=2,
    share=2,
    at_once=(1, 3),
    curve_repeats=1,
    patience_s=0.0,
)


@dataclass(frozen=True)
class Served:
    """One model, behind a gateway and in this process, with the same adapters on either."""

    folder: Path
    adapters: Sequence[Path]
    gateway: Measured
    samplers: Mapping[str, Sequence[tinker.SamplingClient]]
    engine: Any

    @property
    def processes(self) -> dict[str, int]:
        """What works when a prompt goes through HTTP."""
        pid = self.gateway.pid
        return {"client": os.getpid(), "gateway": pid, "engine": engine_process(pid)}

    def sides(self, plan: Plan, asked: Sequence[list[int]]) -> dict[str, ThroughGateway | EngineAlone]:
        """Our four ways, by the names in OURS."""
        names = [adapter.name for adapter in self.adapters]
        return {
            "http": ThroughGateway(self.samplers["base"], asked, plan.new_tokens),
            "http_adapters": ThroughGateway(self.samplers["adapters"], asked, plan.new_tokens),
            "engine": EngineAlone(self.engine, asked, plan.new_tokens),
            "engine_adapters": EngineAlone(self.engine, asked, plan.new_tokens, names),
        }


@contextmanager
def served(model: str, threads: int, root: Path) -> Iterator[Served]:
    """For the time of a measurement."""
    from engines.hf import HfEngine
    from engines.interface import EngineConfig

    folder = model_folder(model, root)
    adapters = random_adapters(folder, root / "adapters", ADAPTERS, RANK)
    storage = root / f"storage-{model.replace('/', '-')}"
    for adapter in adapters:
        shutil.copytree(adapter, storage / adapter.name)
    data = root / f"gateway-{model.replace('/', '-')}"
    data.mkdir()
    options = {"threads": threads, "device": "cpu", "sample_slots": max(Plan.at_once)}
    config = {"name": "engine", "base_model": model, "model": str(folder), "options": options}
    with ExitStack() as stack:
        measured = stack.enter_context(gateway(data, config))
        admin = stack.enter_context(AdminClient(measured.url, KEY))
        service = stack.enter_context(tinker.ServiceClient(base_url=measured.url, api_key=KEY))
        base = service.create_sampling_client(base_model=model).result()
        adapted = []
        for adapter in adapters:
            made = admin.import_adapter(adapter, base_model=model, name=adapter.name)
            adapted.append(service.create_sampling_client(model_path=made.checkpoint.path).result())
        alone = EngineConfig("alone", "hf", model, str(folder), ("sample",), str(storage), 1, options)
        engine = HfEngine.load(alone)
        stack.callback(engine.close)
        yield Served(folder, adapters, measured, {"base": [base], "adapters": adapted}, engine)


def measure(model: str, plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """All ways of one model."""
    with served(model, threads, root) as here:
        settings = {"threads": threads, "new_tokens": plan.new_tokens, "prompts": plan.prompts}
        settings |= {"shortest": plan.shortest, "longest": plan.longest}
        with PlainProcess("generate", here.folder, settings) as plain:
            found = _compare(here, plan, plain)
        return found | {"curve": _curve(here, plan)}


def _compare(here: Served, plan: Plan, plain: PlainProcess) -> dict[str, Any]:
    """Our ways in turn with theirs, and whether all came to the same tokens."""
    asked = prompts(vocabulary(here.folder), plan.prompts, plan.shortest, plan.longest)
    ours = here.sides(plan, asked)
    theirs = {
        "one_by_one": Generated(plain, "one by one", plan.prompts, plan.share),
        "batch": Generated(plain, "batch", plan.prompts),
        "continuous": Generated(plain, "continuous", plan.prompts),
    }
    sides = _timed(ours, here)
    sides |= {name: Side(way.rate, {"generate": plain.pid}) for name, way in theirs.items()}
    rounds = alternate(sides, plan.repeats, plan.patience_s)
    if wrong := {name: way.tokens for name, way in ours.items() if not _whole(way.tokens, plan)}:
        raise RuntimeError(f"{plan.new_tokens} tokens were asked for of each prompt; other counts: {wrong}")
    compared = {f"{mine}_to_{other}": ratios(rounds, mine, other) for mine in OURS for other in THEIRS}
    peft = with_peft(plain, here.adapters, max(1, plan.prompts // ADAPTERS // plan.share))
    alone = EngineAlone(here.engine, asked, plan.new_tokens, [adapter.name for adapter in here.adapters])
    each_alone = {
        number: tokens for n in range(plan.prompts) for number, tokens in alone.continued([n]).items()
    }
    return {
        "parameters": plain.parameters,
        **{name: summary((done[name] for done in rounds), plan.prompts * plan.new_tokens) for name in sides},
        "ratios": compared,
        "ratio": round(median(compared["http_to_one_by_one"]), 4),
        "others": disturbance(rounds),
        "same_tokens": {
            **{
                name: agreement(ours[name].tokens, theirs["one_by_one"].tokens) for name in ("http", "engine")
            },
            **{
                f"{name}_peft": agreement(ours[name].tokens, peft)
                for name in ("http_adapters", "engine_adapters")
            },
            "engine_adapters_alone": agreement(ours["engine_adapters"].tokens, each_alone),
        },
    }


def _curve(here: Served, plan: Plan) -> dict[str, Any]:
    """Tokens per second of our ways with more and more prompts at once."""
    found: dict[str, Any] = {"at_once": list(plan.at_once), "others": []}
    for count in plan.at_once:
        asked = prompts(vocabulary(here.folder), count, plan.shortest, plan.longest)
        sides = _timed(here.sides(plan, asked), here)
        rounds = alternate(sides, plan.curve_repeats, 0.0, warm=True)
        for name in sides:
            found.setdefault(name, []).append(round(median([done[name].rate for done in rounds]), 1))
        found["others"].append(max(disturbance(rounds)))
    return found


def _timed(ways: Mapping[str, ThroughGateway | EngineAlone], here: Served) -> dict[str, Side]:
    alone = {"engine": os.getpid()}
    return {
        name: Side(way.rate, here.processes if isinstance(way, ThroughGateway) else alone)
        for name, way in ways.items()
    }


def _whole(tokens: Mapping[int, list[int]], plan: Plan) -> bool:
    return len(tokens) == plan.prompts and all(len(new) == plan.new_tokens for new in tokens.values())


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
    plan = SMOKE if args.smoke else replace(Plan(), repeats=args.repeats, patience_s=args.patience)
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": args.threads,
        "rank": RANK,
        "adapters": ADAPTERS,
    }
    results |= {"work": asdict(plan), "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            results["models"][model] = measure(model, plan, args.threads, Path(root))
            print(json.dumps({model: results["models"][model]}, indent=1))
    keep("sampling", results, args.out)


if __name__ == "__main__":
    main()
