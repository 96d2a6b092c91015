"""The tables of what was measured on a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells import span
from benchmarks.measuring import median

Results = Mapping[str, Any]
WORKS = {"one run": "one run", "sixteen runs": "sixteen runs", "decoding": "64 prompts decoded"}
TARGETS = {"one run": 1.0, "sixteen runs": 5.0}


def gpu(results: Results) -> list[str]:
    """One row a model and work: tokens a second of both sides, and what a training step makes of the device."""
    rows = [
        "| model | work | Tandem, tokens/s | the plain way | ratio | of the repeats | target | TFLOP/s | of sheet |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["models"].items():
        for work, label in WORKS.items():
            target = f"≥ {TARGETS[work]}" if work in TARGETS else ""
            rows.append(f"| {name} | {label} | {_sides(found[work])} | {target} | {_made(found[work])} |")
    memory = ", ".join(
        f"{found['bytes_of_a_run'] / 1e6:,.0f} MB on {name}"
        for name, found in results["models"].items()
        if "bytes_of_a_run" in found
    )
    rates = [found["device_tflops"] for found in results["models"].values() if "device_tflops" in found]
    versions = results["versions"]
    told = f"On one {results['device']} (torch {versions['torch']}, Transformers {versions['transformers']})."
    if rates:
        told += (
            f" A run of rank {results['rank']} on all layers takes {memory}: values, gradient and both moments in "
            f"float32. A product of 8,192 rows and columns reaches {median(rates):,.0f} TFLOP/s."
        )
    return [*rows, "", told]


def megatron(results: Results) -> list[str]:
    """One row a work: tokens a second of the two engines."""
    rows = [
        "| work | megatron-core, tokens/s | Transformers | ratio | of the repeats |",
        "|---|---:|---:|---:|---:|",
    ]
    for work in ("one run", "sixteen runs"):
        rows.append(f"| {work} | {_sides(results[work])} |")
    return [*rows, "", f"{results['model']} on {results['device']}, rank {results['rank']}."]


def _sides(found: Results) -> str:
    ours, theirs = (f"{median(found[side]):,.0f}" for side in ("ours", "theirs"))
    return f"{ours} | {theirs} | **{found['ratio']:.2f}** | {span(found['ratios'])}"


def _made(found: Results) -> str:
    made = found.get("utilisation")
    if made is None:
        return " | "
    share = made.get("of_datasheet")
    return f"{made['tflops']:.0f} | {'' if share is None else f'{100 * share:.0f} %'}"
