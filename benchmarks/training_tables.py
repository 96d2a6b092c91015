"""Tables and charts of what training costs, for `benchmarks.report`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks import plots
from benchmarks.cells import disturbed, rate, span
from benchmarks.measuring import median

Results = Mapping[str, Any]

TRAINING_TARGETS = {
    ("tandem/tiny", "8 × 128"): 0.6,
    ("random/qwen3-34m", "8 × 128"): 0.95,
    ("random/qwen3-34m", "8 × 512"): 1.0,
}
PADDING_TARGET = 0.9
"""Of what padding costs the plain loop, where lengths differ."""
HARDWARE_TARGETS = {"random/qwen3-34m": 0.7}


def training(results: Results) -> list[str]:
    """One row a model and shape of a step: both speeds, their ratio, and where the processor time of a step goes."""
    measured = _by_shape(results)
    rows = [
        "| model | a step | Tandem, tokens/s | plain loop, tokens/s | ratio | of the repeats | target |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (model, shape), found in measured.items():
        wanted = _training_target(model, shape, found)
        rows.append(
            f"| {model} | {shape} | {rate(found['tandem'])} | {rate(found['plain'])} | **{found['ratio']:.2f}** | "
            f"{span(found['ratios'])} | {'' if wanted is None else f'≥ {wanted:.3g}'} |"
        )
    rows += [
        "",
        "| processor time of a step, ms | | client | gateway | engine | plain loop | gateway's share of the step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (model, shape), found in measured.items():
        spent = {**found["tandem"]["cpu_ms"], **found["plain"]["cpu_ms"]}
        rows.append(
            f"| {model} | {shape} | "
            + " | ".join(f"{milliseconds:.1f}" for milliseconds in spent.values())
            + f" | {found['gateway_share']:.1%} |"
        )
    worst = max(found["largest_difference_of_losses"] for found in measured.values())
    return [
        *rows,
        "",
        f"The losses of the two loops differ by at most {worst:.1g}, relatively. "
        f"{disturbed([share for found in measured.values() for share in found['others']])}",
    ]


def _by_shape(results: Results) -> dict[tuple[str, str], Results]:
    return {
        (model, shape): found
        for model, shapes in results["models"].items()
        for shape, found in shapes.items()
    }


def _training_target(model: str, shape: str, found: Results) -> float | None:
    if found["padding"] > 1:
        return PADDING_TARGET * float(found["padding"])
    return TRAINING_TARGETS.get((model, shape))


def hardware(results: Results) -> list[str]:
    """One row a model: what a step makes of the processor's rate; then where its time goes."""
    rows = [
        "| model | products alone, GFLOP/s | a step, GFLOP/s | share | of the repeats | target |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for model, found in results["models"].items():
        alone, step = (median(found[side]["gflops"]) for side in ("products", "step"))
        wanted = HARDWARE_TARGETS.get(model)
        rows.append(
            f"| {model} | {alone:.0f} | {step:.0f} | **{found['share']:.2f}** | {span(found['shares'])} | "
            f"{'' if wanted is None else f'≥ {wanted}'} |"
        )
    kinds = list(next(iter(results["models"].values()))["seconds"])
    rows += ["", "| time of a step, % | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for model, found in results["models"].items():
        seconds = found["seconds"]
        parts = " | ".join(f"{100 * seconds.get(kind, 0.0) / sum(seconds.values()):.1f}" for kind in kinds)
        rows.append(f"| {model} | {parts} |")
    rows_a_step, length = results["batch"]
    shares = [share for found in results["models"].values() for share in found["others"]]
    return [*rows, "", f"One run, {rows_a_step} × {length} tokens a step. {disturbed(shares)}"]


def tenants(results: Results) -> list[str]:
    """One row a model and span of lengths: the ways that were measured, and what common passes bring."""
    spans = [
        (model, lengths, found)
        for model, spans in results["models"].items()
        for lengths, found in spans.items()
    ]
    sides = [side for side in ("together", "apart", "http", "peft") if side in spans[0][2]]
    pairs = sorted(spans[0][2]["ratios"])
    heads = [f"{side}, tokens/s" for side in sides] + [pair.replace("_", " ") for pair in pairs]
    rows = [
        "| model | tokens a sequence | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(heads),
    ]
    for model, lengths, found in spans:
        rates = " | ".join(rate(found[side]) for side in sides)
        compared = [found["ratios"][pair] for pair in pairs]
        ratios = " | ".join(f"**{median(them):.2f}** ({span(them)})" for them in compared)
        rows.append(f"| {model} | {lengths} | {rates} | {ratios} |")
    worst = max(found["largest_difference_of_losses"] for _, _, found in spans)
    shares = [share for _, _, found in spans for share in found["others"]]
    return [
        *rows,
        "",
        f"{spans[0][2]['runs']} runs. Their losses differ from PEFT's by at most {worst:.1g}, relatively. Other "
        f"processes used {median(shares):.0%} of the machine, at most {max(shares):.0%}.",
    ]


def deterministic(results: Results) -> list[str]:
    """One row a model and number of runs: what is slower in deterministic mode."""
    rows = [
        "| model | runs | default, tokens/s | deterministic, tokens/s | ratio | of the repeats |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    measured = [
        (model, runs, found) for model, counts in results["models"].items() for runs, found in counts.items()
    ]
    for model, runs, found in measured:
        rates = " | ".join(rate(found[side]) for side in ("default", "deterministic"))
        rows.append(f"| {model} | {runs} | {rates} | **{found['ratio']:.2f}** | {span(found['ratios'])} |")
    worst = max(found["largest_difference_of_losses"] for _, _, found in measured)
    shares = [share for _, _, found in measured for share in found["others"]]
    return [*rows, "", f"The losses differ by at most {worst:.1g}, relatively. {disturbed(shares)}"]


def loss_memory(results: Results) -> list[str]:
    """One row a way: memory above what was there before, and time."""
    rows = ["| | peak extra memory | seconds, there and back |", "|---|---:|---:|"]
    for name, what in (("full logits", "full"), ("in chunks", "chunked")):
        found = results[what]
        rows.append(f"| {name} | {max(found['bytes']) / 2**30:.2f} GiB | {median(found['seconds']):.1f} |")
    return [
        *rows,
        "",
        f"Ratio of the times **{results['ratio']:.2f}** ({span(results['ratios'])}); vocabulary "
        f"{results['vocabulary']:,}, width {results['width']:,}, {results['tokens']:,} tokens. Log-probs differ by at "
        f"most {results['largest_difference']:.1g}, gradients by {results['difference_of_gradients']:.1g}, relatively.",
    ]


def scaling(results: Results) -> list[str]:
    """One table a quantity that grows."""
    rows = []
    for name, what in (("runs", "runs"), ("tokens a sequence", "length"), ("idle runs", "idle")):
        points = results[what]
        rows += [
            f"| {name} | " + " | ".join(f"{at:,}" for at, _ in points) + " |",
            "|---|" + "---:|" * len(points),
            "| tokens/s | " + " | ".join(f"{rate:,.0f}" for _, rate in points) + " |",
            "",
        ]
    return rows[:-1]


def training_chart(results: Results) -> str:
    series, wanted = {}, {}
    for (model, shape), found in _by_shape(results).items():
        name = f"{model.partition('/')[2]}, {shape}"
        series[name] = _by_repeat(found["ratios"])
        target = _training_target(model, shape, found)
        if target is not None:
            wanted[name] = target
    return plots.lines("Training through Tandem, against the plain loop", "repeat", "ratio", series, wanted)


def scaling_chart(results: Results) -> str:
    """Speed against what grows, as a share of the best one, by powers of two."""
    names = {"runs": "runs of 64 tokens", "length": "tokens a sequence", "idle": "idle runs"}
    series = {}
    for what, name in names.items():
        best = max(rate for _, rate in results[what])
        series[name] = [(math.log2(max(at, 1)), rate / best) for at, rate in results[what]]
    return plots.lines("Training as the work grows", "log2", "tokens/s, share of the best", series)


def _by_repeat(ratios: list[float]) -> list[tuple[float, float]]:
    return [(float(repeat), ratio) for repeat, ratio in enumerate(ratios, start=1)]
