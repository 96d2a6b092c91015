"""Renews the tables and charts of docs/benchmarks.md from the results: `python -m benchmarks.report`.

A table stands between two comments that name its results; whatever else the page says is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.cells import disturbed, rate, span
from benchmarks.gpu_tables import gpu, megatron
from benchmarks.measuring import RESULTS, ROOT, median
from benchmarks.training_tables import (
    deterministic,
    hardware,
    loss_memory,
    scaling,
    scaling_chart,
    tenants,
    training,
    training_chart,
)

Results = Mapping[str, Any]
Chart = Callable[[Results], str]

PAGE = ROOT / "docs" / "benchmarks.md"
SAMPLING_TARGET = 7.0
_GENERATED = re.compile(r"<!-- results: (?P<name>[\w-]+) -->\n.*?<!-- end -->\n", re.DOTALL)


def renewed(page: str, folder: Path = RESULTS) -> str:
    """The page with the tables of all results that the folder holds. Raises KeyError for an unknown name."""

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        render = TABLES[name]
        file = folder / f"{name}.json"
        if not file.exists():
            return found[0]
        results = json.loads(file.read_text())
        body = "\n".join([*render(results), "", where(results)])
        return f"<!-- results: {name} -->\n{body}\n<!-- end -->\n"

    return _GENERATED.sub(table, page)


def charts(folder: Path = RESULTS) -> dict[str, str]:
    """File name and text of each chart whose results the folder holds."""
    drawn = {}
    for name, draw in CHARTS.items():
        file = folder / f"{name}.json"
        if file.exists():
            drawn[f"{name}.svg"] = draw(json.loads(file.read_text()))
    return drawn


def where(results: Results) -> str:
    """The line under a table: machine and date."""
    machine = results["machine"]
    threads = f", {results['threads']} threads" if "threads" in results else ""
    return (
        f"{machine['time']} UTC on {machine['cores']} cores of {machine['processor']}, Python {machine['python']}"
        f"{threads}; load of the machine when it began: {machine['load_at_start']:.1f}."
    )


# ---------------------------------------------------------------------------- tables


def roundtrip(results: Results) -> list[str]:
    """One row a client: latency of a future, futures per second, what a future costs."""
    future, echo = results["future"], results["echo"]
    rows = ["| | median | 95 % | per second | gateway's processor time |", "|---|---:|---:|---:|---:|"]
    for clients in ("1 clients", "16 clients"):
        numbers = future[clients]
        name = "1 client" if clients == "1 clients" else clients
        rows.append(
            f"| future, {name} | {numbers['p50_ms']:.2f} ms | {numbers['p95_ms']:.2f} ms | "
            f"{numbers['per_second']:.0f} | {numbers['gateway_cpu_ms']:.2f} ms |"
        )
    for clients, numbers in echo.items():
        name = "1 client" if clients == "1 clients" else clients
        rows.append(
            f"| two bare echoes, {name} | {numbers['p50_ms']:.2f} ms | | {numbers['per_second']:.0f} | |"
        )
    rows.append(f"| future, official SDK | {results['future']['sdk']['p50_ms']:.2f} ms | | | |")
    return [*rows, "", f"The gateway occupied {future['gateway_resident_mb']:.0f} MB when it ended."]


def placement(results: Results) -> list[str]:
    """One row a measure: an engine of this machine, one on a Ray node, and the difference."""
    rows = ["| | process of this machine | Ray node | difference |", "|---|---:|---:|---:|"]
    here, ray = results["here"], results["ray"]
    for load in ("1 client", "16 clients"):
        for key, name, unit in (("p50_ms", "median", " ms"), ("per_second", "per second", "")):
            digits = 2 if unit else 0
            a, b = here[load][key], ray[load][key]
            rows.append(
                f"| {load}, {name} | {a:.{digits}f}{unit} | {b:.{digits}f}{unit} | {b - a:+.{digits}f}{unit} |"
            )
    a, b = here["back_after_s"], ray["back_after_s"]
    return [*rows, f"| ready again after a kill | {a:.1f} s | {b:.1f} s | {b - a:+.1f} s |"]


def sampling(results: Results) -> list[str]:
    """One row a way of sampling each model: speed, and the ratios to the three ways of Transformers."""
    theirs = {
        "one_by_one": "`generate`, one by one",
        "batch": "`generate`, padded batch",
        "continuous": "`generate_batch`, continuous",
    }
    mixed = f"{results['adapters']} adapters mixed"
    ours = {
        "http": "through HTTP, base model",
        "http_adapters": f"through HTTP, {mixed}",
        "engine": "engine, base model",
        "engine_adapters": f"engine, {mixed}",
    }
    rows = [
        "| model | | tokens/s | to one by one | to the batch | to continuous |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model, found in results["models"].items():
        for side, name in ours.items():
            compared = [found["ratios"][f"{side}_to_{other}"] for other in theirs]
            ratios = " | ".join(f"**{median(them):.2f}** ({span(them)})" for them in compared)
            rows.append(f"| {model} | {name} | {rate(found[side])} | {ratios} |")
        rows += [f"| | {name} | {rate(found[side])} | | | |" for side, name in theirs.items()]
    others = [share for found in results["models"].values() for share in found["others"]]
    same = min(share for found in results["models"].values() for share in found["same_tokens"].values())
    return [
        *rows,
        "",
        *_curve(results, ours),
        "",
        f"Wanted of random/qwen3-34m: on the base model {SAMPLING_TARGET:g} times one by one, 0.9 of the batch and 1.3 "
        f"times continuous; with adapters 0.65 of the batch. At least {same:.0%} of the compared prompts are continued "
        f"with the same tokens. {disturbed(others)}",
    ]


def _curve(results: Results, names: Mapping[str, str]) -> list[str]:
    """Tokens per second by the number of prompts at once."""
    at_once = next(iter(results["models"].values()))["curve"]["at_once"]
    rows = [
        "| model | tokens/s with so many prompts at once | " + " | ".join(map(str, at_once)) + " |",
        "|---|---|" + "---:|" * len(at_once),
    ]
    for model, found in results["models"].items():
        for side, name in names.items():
            rates = " | ".join(f"{rate:,.0f}" for rate in found["curve"][side])
            rows.append(f"| {model} | {name} | {rates} |")
    return rows


def sharing(results: Results) -> list[str]:
    """One row a share: what is left of the speed of training and of sampling while both go on."""
    rows = [
        "| share | training alone, tokens/s | beside sampling | left | sampling alone | beside training | left |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for share, found in results["shares"].items():
        parts = []
        for name in ("training", "sampling"):
            alone, beside = found[f"{name}_alone"], found[f"{name}_beside"]
            parts.append(f"{alone:,.0f} | {beside:,.0f} | **{beside / alone:.2f}**")
        rows.append(f"| {share} | " + " | ".join(parts) + " |")
    return rows


def paging(results: Results) -> list[str]:
    """One row a side: speed, and where the processor time of a step goes; then the ratio."""
    runs, places = results["runs"], results["places"]
    names = {"paging": f"{runs} runs, memory for {places}", "resident": f"{places} runs, all in memory"}
    rows = ["| | tokens/s | client, ms a step | gateway, ms | engine, ms |", "|---|---:|---:|---:|---:|"]
    for side, name in names.items():
        spent = " | ".join(f"{spent:.1f}" for spent in results[side]["cpu_ms"].values())
        rows.append(f"| {name} | {rate(results[side])} | {spent} |")
    changes = results["counters"]["restores"] / (runs * results["steps"] * (len(results["ratios"]) + 1))
    return [
        *rows,
        "",
        f"Ratio **{results['ratio']:.2f}** ({span(results['ratios'])}). A run occupies "
        f"{results['run_bytes'] / 1e6:.1f} MB; {changes:.2f} times a step one came back into memory. The losses differ "
        f"from those of a run that stayed by at most {results['largest_difference_of_losses']:.1g}, relatively. "
        f"{disturbed(results['others'])}",
    ]


def recovery(results: Results) -> list[str]:
    """One row a way to recover: the pause, what the engine's start takes of it, what was applied again."""
    rows = [
        "| | pause | of which the engine's start | operations applied again | losses |",
        "|---|---:|---:|---:|---|",
    ]
    names = {"snapshots": f"a snapshot every {results['every']} steps", "whole_log": "no snapshots"}
    for key, name in names.items():
        found = results[key]
        rows.append(
            f"| {name} | {found['pause_s']:.2f} s | {found['start_s']:.2f} s | {found['applied_again']} | "
            f"{'the same' if found['same_losses'] else 'different'} |"
        )
    return [
        *rows,
        "",
        f"Wanted, with snapshots: less than {results['wanted_s']:g} s besides the engine's start.",
    ]


# ---------------------------------------------------------------------------- charts


def sampling_chart(results: Results) -> str:
    """Speed against prompts at once, as a share of the best one of each model, so that models fit on one chart."""
    series = {}
    for model, found in results["models"].items():
        for side, name in (("http", "HTTP"), ("engine_adapters", "adapters")):
            rates = found["curve"][side]
            series[f"{model.partition('/')[2]}, {name}"] = [
                (float(count), rate / max(rates))
                for count, rate in zip(found["curve"]["at_once"], rates, strict=True)
            ]
    return plots.lines("Prompts sampled at once", "prompts", "tokens/s, share of the best", series)


def pressure(results: Results) -> list[str]:
    """One row a kind of client: what became of its samples, what they cost, what another client felt."""
    rows = [
        "| | answered | in | memory grown by | threads | another's round trip: smallest | median | 95 % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, kind in (("nothing else to do", "idle"), ("raw client", "raw"), ("official SDK", "sdk")):
        found = results[kind]
        other = found.get("other", found)
        cost = "| | | | "
        if kind != "idle":
            cost = (
                f"| {found['answered']} of {results['samples']} | {found['seconds']:.1f} s "
                f"| {found['grown_mb']:.0f} MB | {found['threads_before']} → {found['threads']} "
            )
        felt = " | ".join(f"{other[part]:.1f} ms" for part in ("smallest_ms", "p50_ms", "p95_ms"))
        rows.append(f"| {name} {cost}| {felt} |")
    return rows


def full_table(results: Results) -> list[str]:
    """One row a database: a million stored calls against none, and what deleting costs a client meanwhile."""
    rows = [
        "| | round trip, full | empty | ratio | calls deleted a second | results | a client's speed meanwhile |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["stores"].items():
        trips, pruned = found["round_trip"], found["pruning"]
        full, empty = median(trips["full"]), median(trips["empty"])
        calls, deleted = (median(pruned["rows_per_second"][kind]) for kind in ("calls", "results"))
        rows.append(
            f"| {name}, {found['futures']:,} calls | {full:.2f} ms | {empty:.2f} ms | **{trips['ratio']:.2f}** "
            f"({span(trips['ratios'])}) | {calls:,.0f} | {deleted:,.0f} | **{pruned['ratio']:.2f}** "
            f"({span(pruned['ratios'])}) |"
        )
    return rows


def growth(results: Results) -> list[str]:
    """Bytes of a thousand steps, with and without what is over."""
    rows = ["| | in use | file |", "|---|---:|---:|"]
    for name, what in (("everything kept", "kept"), ("what is over deleted", "deleted")):
        found = results[what]
        rows.append(f"| {name} | {found['used'] / 1e6:.1f} MB | {found['file'] / 1e6:.1f} MB |")
    return [*rows, "", f"{results['steps']:,} steps."]


def vllm(results: Results) -> list[str]:
    """One row a server: speed of many requests, and how long one token takes."""
    rows = [
        f"| {results['model']} | tokens/s, {results['requests']} requests | one token |",
        "|---|---:|---:|",
    ]
    for name, side in (("Tandem with vLLM", "tandem"), ("vLLM's own server", "vllm")):
        found = results[side]
        rows.append(f"| {name} | {median(found['tokens_s']):,.0f} | {median(found['p50_ms']):.1f} ms |")
    pairs = list(zip(results["tandem"]["tokens_s"], results["vllm"]["tokens_s"], strict=True))
    more = zip(results["tandem"]["p50_ms"], results["vllm"]["p50_ms"], strict=True)
    differences = [ours - theirs for ours, theirs in more]
    return [
        *rows,
        "",
        f"Ratio of the speeds **{results['throughput_ratio']:.2f}** ({span([a / b for a, b in pairs])}), wanted ≥ "
        f"0.95. One token takes **{results['latency_more_ms']:+.1f} ms** ({min(differences):+.1f} to "
        f"{max(differences):+.1f}), wanted at most 3 ms more. Medians of {len(pairs)} repeats, {results['tokens']} "
        "tokens a request.",
    ]


TABLES: Mapping[str, Callable[[Results], list[str]]] = {
    "roundtrip-sqlite": roundtrip,
    "roundtrip-postgres": roundtrip,
    "placement": placement,
    "training": training,
    "sampling": sampling,
    "sharing": sharing,
    "tenants": tenants,
    "deterministic": deterministic,
    "hardware": hardware,
    "gpu": gpu,
    "megatron": megatron,
    "loss_memory": loss_memory,
    "scaling": scaling,
    "paging": paging,
    "pressure": pressure,
    "full-table": full_table,
    "growth": growth,
    "recovery": recovery,
    "vllm": vllm,
}
CHARTS: Mapping[str, Chart] = {
    "training": training_chart,
    "sampling": sampling_chart,
    "scaling": scaling_chart,
}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(renewed(PAGE.read_text()))
    images = PAGE.parent / "images"
    images.mkdir(exist_ok=True)
    for name, text in charts().items():
        (images / name).write_text(text)
    print(f"{PAGE} is renewed")


if __name__ == "__main__":
    main()
