"""What the ranks of a layout send each other during a training step, by kind and purpose.

Arithmetic on sizes alone; no torch. Tests compare it with what real ranks call, megatron-core's own calls included.
The exchange of experts' tokens is as planned, and has not been measured. Left out is what does not grow with the model:
shapes that stages tell each other, and calls and verdicts as msgpack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from engines.megatron.constraints import Layout
from engines.megatron.costs import (
    FLOAT,
    Workload,
    chunk_rows,
    expert_adapter,
    layer_matrices,
    rank_tokens,
    stage_adapter,
)
from engines.megatron.shapes import ModelShape

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


class Traffic(msgspec.Struct, frozen=True):
    """Calls of one kind among `ranks` ranks; `size` are the bytes of the whole tensors of all calls together."""

    kind: Kind
    ranks: int
    calls: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, when the ranks form a ring: a sum goes round it twice."""
        if self.kind == "send":
            return self.size
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.size * (self.ranks - 1) / self.ranks


def stage_traffic(
    shape: ModelShape, layout: Layout, load: Workload, stage: int, passes: int
) -> Iterator[Traffic]:
    """Of a rank of one pipeline stage during a step of `passes` passes, each of `load.tokens` tokens with one target
    each, of `load.runs` runs with adapters on all matrices."""
    for each in pass_traffic(shape, layout, load, stage):
        yield msgspec.structs.replace(each, calls=each.calls * passes, size=each.size * passes)
    yield from _gradients(shape, layout, load, stage)


def pass_traffic(shape: ModelShape, layout: Layout, load: Workload, stage: int) -> Iterator[Traffic]:
    """Of one pass, there and back."""
    layers = shape.layers // layout.pipeline
    stream = rank_tokens(layout, load) * shape.hidden * load.weight_bytes
    first, last = stage == 0, stage == layout.pipeline - 1
    if layout.tensor > 1:
        yield from _layers(layout, load, layers, stream)
        yield from _tables(shape, layout, load, stream, first=first, last=last)
    if layout.pipeline > 1:
        neighbours = 1 if first or last else 2
        own = stream // layout.tensor if layout.sequence else stream
        yield Traffic("send", 2, neighbours, neighbours * own)
    if layout.context > 1:
        tokens = rank_tokens(layout, load) * layout.context
        states = tokens * 2 * shape.kv_width // layout.tensor * load.weight_bytes
        there = layers * (2 if load.recompute else 1)
        yield Traffic("all_gather", layout.context, there, there * states)
        yield Traffic("reduce_scatter", layout.context, layers, layers * states)
        if last:
            yield Traffic("all_gather", layout.context, 1, tokens * FLOAT)
    if layout.expert > 1:
        calls = layers * (6 if load.recompute else 4)
        spread = layout.tensor if layout.sequence else 1
        yield Traffic("all_to_all", layout.expert, calls, calls * stream * shape.experts_per_token // spread)


def _layers(layout: Layout, load: Workload, layers: int, stream: int) -> Iterator[Traffic]:
    """Each layer sums behind attention and behind the feed-forward part; on the way back, before them. Computed again,
    a layer stops before its last sum."""
    if not layout.sequence:
        calls = layers * (5 if load.recompute else 4)
        yield Traffic("all_reduce", layout.tensor, calls, calls * stream)
        return
    gathers, scatters = (6, 5) if load.recompute else (4, 4)
    yield Traffic("all_gather", layout.tensor, layers * gathers, layers * gathers * stream)
    yield Traffic("reduce_scatter", layout.tensor, layers * scatters, layers * scatters * stream)


def _tables(
    shape: ModelShape, layout: Layout, load: Workload, stream: int, *, first: bool, last: bool
) -> Iterator[Traffic]:
    """The embedding's sum, the unembedding's, and of log-probs: maxima, and sums with the target's logit."""
    summed: Kind = "reduce_scatter" if layout.sequence else "all_reduce"
    if first:
        yield Traffic(summed, layout.tensor, 1, stream)
    if last:
        yield Traffic(summed, layout.tensor, 1, stream)
        if layout.sequence:
            yield Traffic("all_gather", layout.tensor, 1, stream)
        tokens = rank_tokens(layout, load)
        chunks = -(-tokens // chunk_rows(shape, layout))
        yield Traffic("all_reduce", layout.tensor, 2 * chunks, 3 * tokens * FLOAT)


def _gradients(shape: ModelShape, layout: Layout, load: Workload, stage: int) -> Iterator[Traffic]:
    """Once a step: the gradients of factors that all tensor ranks have, and of everything among copies of the model;
    then what each of these has stepped."""
    rank, last = load.adapter_rank, stage == layout.pipeline - 1
    if layout.tensor > 1:
        values = load.runs * rank * shared_width(shape, layout, last=last)
        yield Traffic("all_reduce", layout.tensor, 1, values * FLOAT)
    copies = layout.data * layout.context
    values = load.runs * stage_adapter(shape, layout, stage, rank)
    experts = load.runs * expert_adapter(shape, layout, rank)
    if copies > 1:
        yield Traffic("all_reduce", copies, load.runs, (values - experts) * FLOAT)
        yield Traffic("all_gather", copies, load.runs, (values - experts) * FLOAT)
    expert_copies = layout.stage_ranks // layout.expert
    if experts and expert_copies > 1:
        yield Traffic("all_reduce", expert_copies, load.runs, experts * FLOAT)
        yield Traffic("all_gather", expert_copies, load.runs, experts * FLOAT)


def shared_width(shape: ModelShape, layout: Layout, *, last: bool) -> int:
    """Inputs of matrices that are cut by their outputs, and outputs of the others: what an adapter has whole on each
    tensor rank, for each of its rank. Experts are whole on one rank, and share nothing."""
    attention = list(layer_matrices(shape, layout))[:4]
    layer = sum(matrix.inputs for matrix in attention[:3]) + attention[3].outputs
    if not shape.experts:
        layer += 3 * shape.hidden
    return layer * (shape.layers // layout.pipeline) + (shape.hidden if last else 0)
