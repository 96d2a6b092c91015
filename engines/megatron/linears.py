"""The linear layers of one rank, with adapters: its share of the frozen weight, and of every adapter's factors.

Column-parallel layers (q, k, v; gate, up) divide their outputs: A is on every rank, B divided by rows. Row-parallel
ones (o, down) divide their inputs: A is divided by columns, B on every rank. An adapter's share is added to the rank's
own product before that is summed over the ranks, so adapters cost no communication of their own in a layer. What a rank
adds to the gradient of a factor that all ranks have is its part of a sum, which `engines.megatron.sharding` completes,
once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engines.megatron.megatron_core import mappings
from engines.tuning.lora import ANCHOR, Piece, Routing, add_deltas, add_gradients, add_product, factored


class Part(NamedTuple):
    """Outputs [start, stop) of a rank's layer are one linear layer of the model, the site number `site`."""

    site: int
    start: int
    stop: int


class ShardedLinear(nn.Module):
    """A frozen weight [out, in] of this rank, and the adapters of the pass at hand on its parts."""

    def __init__(self, inputs: int, outputs: int, config: Any, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = nn.Parameter(
            torch.empty(outputs, inputs, dtype=config.params_dtype), requires_grad=False
        )
        self.parts: Sequence[Part] = ()
        self.routing = Routing()

    def adapt(self, parts: Sequence[Part], routing: Routing) -> None:
        """Say which sites the layer's outputs are, and where the segments of a pass stand."""
        self.parts = parts
        self.routing = routing

    def product(self, x: Tensor) -> Tensor:
        """[T, 1, in] to this rank's own [T, 1, out]."""
        rows = x.reshape(-1, x.shape[-1])
        pieces = [(part, self.routing.at(part.site)) for part in self.parts]
        pieces = [(part, own) for part, own in pieces if own]
        if not pieces:
            out = F.linear(rows, self.weight)
        elif torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Product.apply
            out = apply(rows, ANCHOR, self.weight, pieces)
        else:
            out = F.linear(rows, self.weight)
            for part, own in pieces:
                add_deltas(out[:, part.start : part.stop], rows, own)
        return out.view(*x.shape[:-1], out.shape[-1])


class ColumnLinear(ShardedLinear):
    """Each rank computes its share of the outputs from all inputs. Takes what megatron-core's own is made with."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, tp_group: Any, **ignored: Any
    ) -> None:
        super().__init__(input_size, output_size // tp_group.size(), config, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            whole = mappings.gather_from_sequence_parallel_region(x, group=self.group)
        else:
            whole = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        return self.product(whole), None


class QkvLinear(ColumnLinear):
    """Queries, keys and values in one product, handed on as megatron-core wants them: group by group."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, tp_group: Any, **ignored: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, tp_group=tp_group)
        self.groups = config.num_query_groups // tp_group.size()
        queries = config.num_attention_heads // config.num_query_groups
        self.sizes = [self.groups * heads * config.kv_channels for heads in (queries, 1, 1)]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out, _ = super().forward(x)
        parts = [part.unflatten(-1, (self.groups, -1)) for part in out.split(self.sizes, dim=-1)]
        return torch.cat(parts, dim=-1).flatten(-2), None


class RowLinear(ShardedLinear):
    """Each rank computes all outputs from its share of the inputs; their sum is the result."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, tp_group: Any, **ignored: Any
    ) -> None:
        super().__init__(input_size // tp_group.size(), output_size, config, tp_group)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        own = self.product(x)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(own, group=self.group), None
        return mappings.reduce_from_tensor_model_parallel_region(own, group=self.group), None


class _Product(torch.autograd.Function):
    """`rows @ W.T` and the deltas of all parts' pieces as one node of the graph. W gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, weight: Tensor, pieces: list[tuple[Part, list[Piece]]]
    ) -> Tensor:
        out = F.linear(rows, weight)
        inner = [
            hidden for part, own in pieces for hidden in add_deltas(out[:, part.start : part.stop], rows, own)
        ]
        ctx.pieces = pieces
        ctx.save_for_backward(rows, weight, *inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *inner = ctx.saved_tensors
        grad_rows = grad @ weight if ctx.needs_input_grad[0] else None
        kept = iter(inner)
        for part, pieces in ctx.pieces:
            for piece in pieces:
                own = slice(piece.start, piece.stop)
                grad_out = factored(grad[own, part.start : part.stop])
                grad_inner = add_gradients(grad_out, factored(rows[own]), next(kept), piece)
                if grad_rows is not None:
                    add_product(grad_rows[own], grad_inner, piece.factors.a, piece.scale)
        return (grad_rows, None, None, None)
