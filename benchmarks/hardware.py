"""How much of what the processor could do a training step of the engine makes use of, and what the rest is.

    python -m benchmarks.hardware [--repeats 5] [--models random/qwen3-34m …] [--smoke]

A step is gradient and optimizer step of one run, LoRA of rank 16 on all layers and the unembedding. What it has to
compute is counted from the model's shape; what the processor could do is measured in turn with it, as the products of
the same shapes by themselves, written to memory that is there. Their ratio is the share. Where the rest of the time
goes is told by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.alternating import Side, alternate, disturbance, ratios
from benchmarks.measuring import RESULTS, keep, machine, median
from benchmarks.tenants import RANK, Together
from benchmarks.workload import LARGER, MODELS, TINY, Shape, model_folder, shaped_batches, vocabulary

NAME = "hardware"
PRODUCTS = "products with frozen weights"
WITH_ADAPTERS = "products with adapters"
OTHERS = "between the operations"
KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product",),
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear"),
    "optimizer": ("adamw",),
    "exponentials, sums": ("exp", "log", "sum", "max", "norm", "vecdot", "linalg", "softmax"),
    "arithmetic of items": ("mul", "add", "sub", "div", "silu", "neg", "sqrt", "pow"),
    "copying": ("copy", "cat", "fill", "zero", "index", "gather", "scatter", "clone", "empty", "resize"),
}
"""Of torch's operations, by parts of their names; the first kind that fits counts."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    repeats: int = 5
    patience_s: float = 60.0
    shape: Shape = field(default_factory=lambda: Shape(8, 512, 512))
    steps: dict[str, int] = field(default_factory=lambda: {TINY: 8, LARGER: 1})


SMOKE = Plan(repeats=1, patience_s=0.0, shape=Shape(2, 8, 8), steps=dict.fromkeys(MODELS, 1))


class Layer(NamedTuple):
    """A linear layer, and how many of this size the model has."""

    inputs: int
    outputs: int
    many: int


class Work(NamedTuple):
    """Floating-point operations of one step: products with frozen weights, with adapters, and of attention."""

    weights: int
    adapters: int
    attention: int

    @property
    def total(self) -> int:
        return sum(self)


def work(
    layers: Sequence[Layer], attention_width: int, depth: int, lengths: Sequence[int], rank: int
) -> Work:
    """Of a step with sequences of such lengths.

    A product of [T, n] and [n, m] takes 2 T n m. A frozen weight takes one there and one back; a factor of an adapter
    two for its gradient, for what it adds may be added to the weight. Causal attention of N tokens takes two products
    of N (N + 1) / 2 pairs there and five back, for the scores are computed again; `attention_width` is heads times
    their size.
    """
    tokens = sum(lengths)
    frozen = sum(layer.inputs * layer.outputs * layer.many for layer in layers)
    factors = sum(rank * (layer.inputs + layer.outputs) * layer.many for layer in layers)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Work(4 * tokens * frozen, 4 * tokens * factors, 14 * pairs * attention_width * depth)


def layers_of(engine: Any) -> list[Layer]:
    """The linear layers of the engine's model, those of equal size together."""
    sizes = Counter((site.in_features, site.out_features) for site in engine.base.sites)
    return [Layer(*size, many) for size, many in sizes.items()]


class Products:
    """The products of one step with the frozen weights, there and back, by themselves."""

    def __init__(self, layers: Sequence[Layer], tokens: int) -> None:
        """The last layer's are computed in chunks of rows, as the engine does it."""
        import torch

        from engines.hf.logprobs import rows_per_chunk

        self.tokens = tokens
        self.factors = {
            layer: (
                torch.randn(min(tokens, rows_per_chunk(layer.outputs)), layer.inputs),
                torch.randn(layer.outputs, layer.inputs),
            )
            for layer in layers
        }

    def rate(self) -> float:
        """Floating-point operations a second."""
        import torch

        done, started = 0, time.perf_counter()
        with torch.no_grad():
            for layer, (rows, weight) in self.factors.items():
                out = rows.new_empty((rows.shape[0], layer.outputs))
                back = torch.empty_like(rows)
                for _ in range(layer.many * max(1, self.tokens // rows.shape[0])):
                    torch.mm(rows, weight.t(), out=out)
                    torch.mm(out, weight, out=back)
                    done += 4 * rows.shape[0] * layer.inputs * layer.outputs
        return done / (time.perf_counter() - started)


def breakdown(loop: Together) -> dict[str, float]:
    """Seconds of one step by kinds of operations. An operation that several threads share counts once; what runs side
    by side counts each time, and leaves nothing between."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        seconds = loop.train(1)
    found: defaultdict[str, float] = defaultdict(float)
    for event in profiled.key_averages(group_by_input_shape=True):
        if event.key.startswith(("aten::", "mkldnn::")):
            found[kind_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e6
    found[OTHERS] = max(0.0, seconds - sum(found.values()))
    return {name: round(spent, 5) for name, spent in sorted(found.items(), key=lambda part: -part[1])}


def kind_of(operation: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of one of torch's operations, given the shapes of what it takes."""
    for kind, parts in KINDS.items():
        if any(part in operation for part in parts):
            return WITH_ADAPTERS if kind == PRODUCTS and any(RANK in shape for shape in shapes) else kind
    return OTHERS


def measure(model: str, plan: Plan, threads: int, root: Path) -> dict[str, Any]:
    """Share and breakdown of one model."""
    from engines.hf import HfEngine
    from engines.interface import EngineConfig

    folder = model_folder(model, root)
    options = {"threads": threads, "device": "cpu"}
    engine = HfEngine.load(
        EngineConfig("bench", "hf", model, str(folder), ("train",), str(root / "storage"), 1, options)
    )
    steps = plan.steps[model]
    loop = Together(engine, "run", shaped_batches(vocabulary(folder), 2, plan.shape), apart=False)
    config = engine.base.module.config
    lengths = [plan.shape.longest] * plan.shape.rows
    layers = layers_of(engine)
    width = config.num_attention_heads * config.head_dim
    todo = work(layers, width, config.num_hidden_layers, lengths, RANK)
    products = Products(layers, sum(lengths))
    own = {"this": os.getpid()}
    sides = {
        "step": Side(lambda: steps * todo.total / loop.train(steps), own),
        "products": Side(lambda: _with_all_threads(engine, products), own),
    }
    rounds = alternate(sides, plan.repeats, plan.patience_s)
    parts = breakdown(loop)
    engine.close()
    shares = ratios(rounds, "step", "products")
    return {
        "work": todo._asdict(),
        **{name: {"gflops": [round(done[name].rate / 1e9, 2) for done in rounds]} for name in sides},
        "shares": shares,
        "share": round(median(shares), 4),
        "seconds": parts,
        "others": disturbance(rounds),
    }


def _with_all_threads(engine: Any, products: Products) -> float:
    engine.base.threads.share_all()
    return products.rate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=Plan.repeats)
    parser.add_argument("--patience", type=float, default=Plan.patience_s, help="seconds to wait for calm")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan(args.repeats, args.patience)
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rank": RANK}
    results |= {"batch": [plan.shape.rows, plan.shape.longest], "models": {}}
    with tempfile.TemporaryDirectory() as root:
        for model in args.models:
            results["models"][model] = measure(model, plan, args.threads, Path(root))
            print(json.dumps({model: results["models"][model]}, indent=1))
    keep(NAME, results, args.out)


if __name__ == "__main__":
    main()
