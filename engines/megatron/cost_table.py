"""The table of docs/megatron.md: what layouts of public models take in memory, and send.

python -m engines.megatron.cost_table
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engines.megatron.constraints import Layout, refuse_impossible
from engines.megatron.costs import Workload, stage_memory
from engines.megatron.shapes import ModelShape
from engines.megatron.traffic import stage_traffic

GIB = 2**30
PASSES = 32
"""Of a step, over all data ranks."""

QWEN3_8B = ModelShape(
    family="qwen3",
    layers=36,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=12288,
    vocabulary=151_936,
    tied=False,
    max_context=40_960,
    norm_eps=1e-6,
    rope_theta=1e6,
)
QWEN3_32B = msgspec.structs.replace(QWEN3_8B, layers=64, hidden=5120, heads=64, ffn=25600)
QWEN3_235B = msgspec.structs.replace(
    QWEN3_8B,
    family="qwen3_moe",
    layers=94,
    heads=64,
    kv_heads=4,
    ffn=1536,
    experts=128,
    experts_per_token=8,
    normalize_expert_weights=True,
)

LAYOUTS: list[tuple[str, ModelShape, list[tuple[Layout, bool]]]] = [
    (
        "Qwen3-8B",
        QWEN3_8B,
        [
            (Layout(), False),
            (Layout(), True),
            (Layout(data=8), True),
            (Layout(tensor=2, data=4, sequence=True), False),
            (Layout(tensor=8), False),
            (Layout(tensor=8, sequence=True), False),
            (Layout(pipeline=4, data=2), False),
            (Layout(context=2, data=4), True),
        ],
    ),
    (
        "Qwen3-32B",
        QWEN3_32B,
        [
            (Layout(tensor=2, data=4, sequence=True), True),
            (Layout(tensor=4, data=2, sequence=True), True),
            (Layout(tensor=8, sequence=True), False),
            (Layout(tensor=4, pipeline=2, sequence=True), True),
            (Layout(pipeline=8), True),
            (Layout(tensor=4, context=2, sequence=True), True),
        ],
    ),
    (
        "Qwen3-235B-A22B",
        QWEN3_235B,
        [
            (Layout(data=16, expert=16), True),
            (Layout(tensor=4, data=4, expert=16, sequence=True), True),
            (Layout(tensor=4, pipeline=2, data=4, expert=16, sequence=True), True),
        ],
    ),
]


def table() -> Iterator[str]:
    """Its lines, in Markdown: GiB of the fullest rank, and GiB that the busiest rank sends in a step."""
    yield "| model | layout | ranks | weights | adapter | activations | logits | memory | sent a step |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for name, shape, layouts in LAYOUTS:
        for layout, recompute in layouts:
            refuse_impossible(shape, layout, layout.ranks)
            load = Workload(recompute=recompute)
            yield _row(name, shape, layout, load)


def _row(name: str, shape: ModelShape, layout: Layout, load: Workload) -> str:
    stages = range(layout.pipeline)
    fullest = max(
        (stage_memory(shape, layout, load, stage) for stage in stages), key=lambda found: found.total
    )
    sent = max(_sent(shape, layout, load, stage) for stage in stages)
    parts = [fullest.weights, fullest.adapters, fullest.activations, fullest.logits, fullest.total, sent]
    cells = " | ".join(f"{size / GIB:.1f}" for size in parts)
    again = ", recompute" if load.recompute else ""
    return f"| {name} | {layout}{again} | {layout.ranks} | {cells} |"


def _sent(shape: ModelShape, layout: Layout, load: Workload, stage: int) -> float:
    passes = PASSES // layout.data
    return sum(each.sent for each in stage_traffic(shape, layout, load, stage, passes))


if __name__ == "__main__":
    print("\n".join(table()))
