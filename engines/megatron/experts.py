"""A layer's experts on one rank: all choose theirs for their own tokens, and each computes those that it holds.

Ranks that share the experts of a layer gather their rows, with what each row chose; a rank adds up what its own experts
make of all rows, and the sums over the ranks go back to where the rows came from. Which runs the others' rows belong to
a rank knows by itself, since all are told the same operations (`engines.megatron.portions.pooled`). A rank thus takes
in every row, also those that chose none of its experts; in exchange nothing depends on how many did.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engines.megatron.megatron_core import mappings
from engines.megatron.shapes import ModelShape
from engines.ranks.collectives import gather
from engines.tuning.experts import MATRICES, Experts
from engines.tuning.lora import Routing


class ExpertBlock(nn.Module):
    """The router, and the `held` experts of this rank, in the place of a layer's feed-forward part."""

    def __init__(
        self, shape: ModelShape, held: int, dtype: torch.dtype, group: dist.ProcessGroup | None
    ) -> None:
        """`group` are the ranks that share the layer's experts, each of which holds the next ones."""
        super().__init__()
        self.shape = shape
        self.held = held
        self.group = group
        hidden, ffn = shape.hidden, shape.ffn
        for name, rows, columns in (
            ("router", shape.experts, hidden),
            ("gate_up", held * 2 * ffn, hidden),
            ("down", held * hidden, ffn),
        ):
            empty = torch.empty(rows, columns, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.experts: Experts | None = None

    def adapt(self, first_site: int, routing: Routing) -> int:
        """Say at which site the experts' begin, and where the segments of the pooled rows stand, once the weights are
        read; gives the number of sites."""
        gate_up, down = self.gate_up, self.down
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        self.experts = Experts(
            gate_up.detach().unflatten(0, (self.held, -1)),
            down.detach().unflatten(0, (self.held, -1)),
            first_site,
            routing,
        )
        return self.held * len(MATRICES)

    def forward(self, x: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        """[t, 1, H] of this rank's own tokens, and the same of what their experts make of them."""
        assert self.experts is not None
        rows = x.flatten(0, 1)
        weights, chosen = self.choose(rows)
        if self.group is None:
            return self.experts(rows, chosen, weights).view_as(x), None
        both = torch.cat([rows, weights], dim=1)
        both = mappings.gather_from_sequence_parallel_region(both, group=self.group)
        rows, weights = both.split([rows.shape[1], weights.shape[1]], dim=1)
        sums = self.experts(rows, self._held(chosen, self.group), weights)
        own = mappings.reduce_scatter_to_sequence_parallel_region(sums, group=self.group)
        return own.view_as(x), None

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the experts that each row [t, H] chose, and which they are, both [t, choices]."""
        assert isinstance(self.router, Tensor)
        likely = F.linear(rows, self.router).softmax(-1, dtype=torch.float32)
        weights, chosen = likely.topk(self.shape.experts_per_token, dim=-1)
        if self.shape.normalize_expert_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(rows.dtype), chosen

    def _held(self, chosen: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What the rows of all ranks chose, counted from this rank's first expert; `held` stands for others'."""
        own = gather(chosen, group) - group.rank() * self.held
        return own.masked_fill((own < 0) | (own >= self.held), self.held)
