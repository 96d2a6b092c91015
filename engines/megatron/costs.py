"""What a layout costs a rank in memory, by what it is for.

Arithmetic on sizes alone; no torch. Weights and adapters are counted exactly. Activations are what a layer keeps, by
the tensors that real ranks were seen to keep (float32, CPU; of models without experts). Of logits two chunks are taken
to be in memory. The base model is frozen: it has neither gradients nor optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engines.megatron.constraints import Layout
from engines.megatron.shapes import ModelShape

VALUE_BYTES = 8
"""For each value of an adapter, all float32: the value and its gradient."""
MOMENT_BYTES = 8
"""For each value that a rank steps: the optimizer's two moments."""
FLOAT = 4
CHUNK_LOGITS = 2**25
"""Logits of a chunk of rows, as `engines.megatron.logprobs` cuts them."""


class Workload(msgspec.Struct, frozen=True):
    """What a rank is to compute at once."""

    tokens: int = 8192
    """Of a pass, on each data parallel rank: the longest datum, if nothing else is packed with it."""
    adapter_rank: int = 32
    runs: int = 1
    """Adapters in memory, each on all matrices."""
    weight_bytes: int = 2
    """Of each number of the base model and of what its layers compute: 2 (bfloat16) or 4 (float32)."""
    recompute: bool = False
    """Keep the inputs of layers alone, and compute the rest again on the way back."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes of one rank."""

    weights: int
    adapters: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations + self.logits


def memory(shape: ModelShape, layout: Layout, load: Workload) -> Memory:
    """Of the rank that needs most: one of the first pipeline stage, or of the last."""
    stages = {0, layout.pipeline - 1}
    return max((stage_memory(shape, layout, load, stage) for stage in stages), key=lambda found: found.total)


def stage_memory(shape: ModelShape, layout: Layout, load: Workload, stage: int) -> Memory:
    """Bytes of a rank of one pipeline stage."""
    last = stage == layout.pipeline - 1
    return Memory(
        weights=stage_weights(shape, layout, stage) * load.weight_bytes,
        adapters=adapter_bytes(shape, layout, stage, load.adapter_rank) * load.runs,
        activations=stage_activations(shape, layout, load, stage),
        logits=2 * FLOAT * chunk_logits(shape, layout, load) if last else 0,
    )


def rank_tokens(layout: Layout, load: Workload) -> int:
    """Tokens of a pass that a rank attends from: those of its context parallel part, rounded up."""
    return -(-load.tokens // layout.context)


def chunk_rows(shape: ModelShape, layout: Layout) -> int:
    """Rows of which a rank has logits at once."""
    return max(1, CHUNK_LOGITS // (shape.vocabulary // layout.tensor))


def chunk_logits(shape: ModelShape, layout: Layout, load: Workload) -> int:
    """Logits that a rank of the last stage has at once."""
    return min(chunk_rows(shape, layout), rank_tokens(layout, load)) * shape.vocabulary // layout.tensor


# ---------------------------------------------------------------------- numbers held


def stage_weights(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Numbers of the base model on a rank of a pipeline stage. The embedding lies on the first one, the unembedding on
    the last; tied ones are the same tensor where both are on one stage."""
    own = layer_weights(shape, layout) * (shape.layers // layout.pipeline)
    table = shape.vocabulary // layout.tensor * shape.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        own += table
    if last:
        own += shape.hidden + (0 if first and shape.tied else table)
    return own


def layer_weights(shape: ModelShape, layout: Layout) -> int:
    """Numbers of one layer of the base model on a rank."""
    split = shape.hidden * (2 * shape.query_width + 2 * shape.kv_width) // layout.tensor
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    feed_forward = 3 * shape.hidden * shape.ffn
    if shape.experts:
        return split + norms + shape.experts * shape.hidden + shape.experts // layout.expert * feed_forward
    return split + norms + feed_forward // layout.tensor


class Matrix(msgspec.Struct, frozen=True):
    """A matrix that an adapter attaches to, as it lies on a rank: its inputs and outputs there."""

    inputs: int
    outputs: int


def layer_matrices(shape: ModelShape, layout: Layout) -> Iterator[Matrix]:
    """A layer's matrices on a rank, in Hugging Face's words: q, k, v, o, then gate, up, down (of each expert)."""
    hidden, tensor = shape.hidden, layout.tensor
    yield Matrix(hidden, shape.query_width // tensor)
    yield Matrix(hidden, shape.kv_width // tensor)
    yield Matrix(hidden, shape.kv_width // tensor)
    yield Matrix(shape.query_width // tensor, hidden)
    ffn = shape.ffn if shape.experts else shape.ffn // tensor
    for _ in range(max(1, shape.experts // layout.expert)):
        yield Matrix(hidden, ffn)
        yield Matrix(hidden, ffn)
        yield Matrix(ffn, hidden)


def stage_adapter(shape: ModelShape, layout: Layout, stage: int, rank: int) -> int:
    """Values of an adapter on all matrices of a rank of a pipeline stage. Of a matrix that is cut by its outputs
    A is whole and B cut; of one that is cut by its inputs, the other way round."""
    layer = sum(matrix.inputs + matrix.outputs for matrix in layer_matrices(shape, layout))
    own = layer * (shape.layers // layout.pipeline)
    if stage == layout.pipeline - 1:
        own += shape.hidden + shape.vocabulary // layout.tensor
    return own * rank


def expert_adapter(shape: ModelShape, layout: Layout, rank: int) -> int:
    """Those of them that belong to experts."""
    if not shape.experts:
        return 0
    experts = list(layer_matrices(shape, layout))[4:]
    return (
        sum(matrix.inputs + matrix.outputs for matrix in experts) * (shape.layers // layout.pipeline) * rank
    )


def adapter_bytes(shape: ModelShape, layout: Layout, stage: int, rank: int) -> int:
    """Bytes of an adapter in training. Ranks that have the same values divide the moments among them
    (`engines.megatron.moments`, but for the rounding of parts)."""
    values = stage_adapter(shape, layout, stage, rank)
    experts = expert_adapter(shape, layout, rank)
    stepped = -(-(values - experts) // (layout.data * layout.context))
    stepped += -(-experts * layout.expert // layout.stage_ranks)
    return values * VALUE_BYTES + stepped * MOMENT_BYTES


# ---------------------------------------------------------------------- numbers kept for the way back


def stage_activations(shape: ModelShape, layout: Layout, load: Workload, stage: int) -> int:
    """Bytes that a rank of a pipeline stage keeps for the way back of all passes which are under way there: as many as
    there are stages from this one on, for a pass comes back only when it has been through the last."""
    layers = shape.layers // layout.pipeline
    tokens = rank_tokens(layout, load)
    whole = layer_activation_bytes(shape, layout, load)
    stream = shape.hidden * load.weight_bytes // (layout.tensor if layout.sequence else 1)
    ends = 1 + (stage == layout.pipeline - 1)  # what comes in, and what the last norm gives
    under_way = layout.pipeline - stage
    buffers = 2 if layout.pipeline > 1 else 0  # what is sent and received
    if load.recompute:
        return tokens * (under_way * (layers + ends) * stream + buffers * stream + whole)
    return tokens * (under_way * (layers * whole + ends * stream) + buffers * stream)


def layer_activation_bytes(shape: ModelShape, layout: Layout, load: Workload) -> int:
    """Bytes for each of its tokens that one layer keeps on a rank.

    The sums behind attention and the feed-forward part (cut with sequence parallelism) and the matrices' normed inputs
    (whole, for they are gathered); queries, keys and values, queries in order, both turned, what attention gave; gate
    and up, their activation, its factor and product; cosines and sines twice; of context parallel ranks all keys and
    values, and attention's stretches. In float32: the adapters' inner products, scales of norms, attention's sums.
    """
    cut, spread = layout.tensor, layout.tensor if layout.sequence else 1
    kept = 2 * shape.hidden // spread + 2 * shape.hidden
    kept += (4 * shape.query_width + 3 * shape.kv_width) // cut + 4 * shape.head_dim
    if layout.context > 1:
        kept += (2 * shape.kv_width * layout.context + shape.query_width) // cut
    floats = 4 * load.adapter_rank + (2 * shape.heads + shape.kv_heads) // cut + 2
    if shape.experts:
        copies = shape.experts_per_token
        kept += copies * (2 * shape.hidden + 5 * shape.ffn) // spread
        floats += (3 * copies * load.adapter_rank + 2 * shape.experts) // spread
    else:
        kept += 5 * shape.ffn // cut
        floats += 3 * load.adapter_rank
    return kept * load.weight_bytes + floats * FLOAT
