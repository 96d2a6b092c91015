"""The engine on megatron-core, one rank, against the engine on Transformers: the same runs, model and device.

    python -m benchmarks.megatron [--repeats 5] [--smoke]

On a CUDA device a random model of the shape of Qwen3-0.6B in bfloat16, else the random one of 34 million parameters in
float32. *One run* trains on one batch of long sequences, *sixteen runs* on a sequence of 64 to 256 tokens each; a step
is gradient and optimizer step. Both engines are in this process and take turns; their losses must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import DIFFERENT, MODELS, RUNS, SPAN, in_turn, random_module
from benchmarks.measuring import RESULTS, keep
from benchmarks.tenants import RANK, Together
from benchmarks.workload import (
    LARGER,
    TINY,
    Batch,
    Shape,
    model_folder,
    shaped_batches,
    tenant_batches,
    vocabulary,
)

NAME = "megatron"
LOSS_TOLERANCE = {"cuda": 2e-2, "cpu": 1e-3}
"""Relative, of the same runs and steps: in bfloat16 each layer rounds some of its sums elsewhere."""


def engine(plugin: str, folder: Path, root: Path, device: str) -> Any:
    """One that trains on a model in a folder."""
    from engines.hf import HfEngine
    from engines.interface import EngineConfig
    from engines.megatron import MegatronEngine

    kinds: dict[str, Any] = {"hf": HfEngine, "megatron": MegatronEngine}
    options = {"device": device, "threads": os.cpu_count() or 1}
    if plugin == "megatron":
        options["devices"] = 1
    storage = str(root / plugin)
    return kinds[plugin].load(
        EngineConfig("bench", plugin, "bench", str(folder), ("train",), storage, 1, options)
    )


def large_folder(root: Path) -> Path:
    """A random model of the shape of Qwen3-0.6B on disk, with a tokenizer that nobody asks."""
    import shutil

    import torch

    folder = root / "0.6B"
    random_module(MODELS["0.6B"], "cuda", torch.bfloat16, "sdpa").save_pretrained(folder)
    for file in model_folder(TINY, root).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def compared(
    ours: Any, theirs: Any, name: str, steps: Sequence[Sequence[Batch]], repeats: int, device: str
) -> dict[str, Any]:
    """Tokens a second of both, and how far their losses are from one another."""
    tokens = sum(batch.inputs.size for step in steps for batch in step) / len(steps)
    sides = [Together(each, name, [list(step) for step in steps], apart=False) for each in (ours, theirs)]
    found = in_turn(lambda: tokens / sides[0].train(1), lambda: tokens / sides[1].train(1), repeats)
    for each, side in zip((ours, theirs), sides, strict=True):
        for item in side.steps:
            each.drop_run(item.run_id)
    pairs = zip(sides[0].losses, sides[1].losses, strict=True)
    difference = max(abs(mine - other) / abs(other) for mine, other in pairs)
    if not difference < LOSS_TOLERANCE[device]:
        raise RuntimeError(f"the engines do not compute the same: their losses differ by {difference:.2g}")
    return {"tokens": tokens, "largest_difference_of_losses": difference, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a short form that only shows that it works")
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    repeats = 1 if args.smoke else args.repeats
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if device == "cuda":
            model, folder = "0.6B", large_folder(root)
        else:
            model = TINY if args.smoke else LARGER
            folder = model_folder(model, root)
        size = vocabulary(folder)
        shape, span = (Shape(2, 8, 8), (4, 9)) if args.smoke else (Shape(8, 512, 512), SPAN)
        ours, theirs = (engine(plugin, folder, root, device) for plugin in ("megatron", "hf"))
        results = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "model": model,
            "rank": RANK,
            "one run": compared(ours, theirs, "one", shaped_batches(size, DIFFERENT, shape), repeats, device),
            "sixteen runs": compared(
                ours, theirs, "many", tenant_batches(size, DIFFERENT, RUNS, *span), repeats, device
            ),
        }
        ours.close()
        theirs.close()
    print(json.dumps(results, indent=1))
    keep(NAME, results, args.out)


if __name__ == "__main__":
    main()
