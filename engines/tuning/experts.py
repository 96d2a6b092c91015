"""The experts of a layer, with adapters on each of them.

Transformers keeps the matrices of all experts of a layer in two parameters; adapters attach to each expert's three
matrices under the names that these have in the published checkpoints, PEFT and vLLM:
`model.layers.0.mlp.experts.7.gate_proj`, `up_proj`, `down_proj`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.tuning.lora import Piece, Routing, Segment, Site, adapted, pieces_at

MATRICES = ("gate_proj", "up_proj", "down_proj")
TRIAL_ROWS = 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Gathered(NamedTuple):
    """Which token each row is of, int64 [rows], rows of one expert after those of the one before and by ascending
    token; `slots` are their places among the token's choices [T * choices]; `bounds` say where each expert's begin."""

    tokens: Tensor
    slots: Tensor
    bounds: list[int]


def gather(chosen: Tensor, experts: int) -> Gathered:
    """By expert, what the tokens have chosen: int64 [T, choices]. Choices from `experts` on are left out."""
    flat = chosen.reshape(-1)
    bounds = [0, *torch.bincount(flat, minlength=experts)[:experts].cumsum(0).tolist()]
    order = torch.argsort(flat, stable=True)[: bounds[-1]]
    return Gathered(order // chosen.shape[1], order, bounds)


class Experts(nn.Module):
    """Each token's rows go through the experts that it chose, each a gated feed-forward part with SiLU, and come back
    as their weighted sum."""

    def __init__(self, gate_up: Tensor, down: Tensor, first_site: int, routing: Routing) -> None:
        """`gate_up` [E, 2F, H], `down` [E, H, F]. The sites of expert e are `first_site + 3e` and the two after it."""
        super().__init__()
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        self.first_site = first_site
        self.routing = routing

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """States [T, H], what each token chose and with which weights, both [T, choices]; gives [T, H].

        What the tokens chose of experts that are not here is left out of the sum.
        """
        found = gather(chosen, self.gate_up.shape[0])
        rows = states[found.tokens]
        segments = self.routing.segments
        owned = found.tokens.tolist() if segments else []
        parts = [
            self.expert(number, rows[start:stop], among(segments, owned[start:stop]))
            for number, (start, stop) in enumerate(zip(found.bounds, found.bounds[1:], strict=False))
            if start < stop
        ]
        outputs = torch.cat(parts) if parts else rows
        weighted = outputs * weights.reshape(-1)[found.slots].unsqueeze(-1)
        return torch.zeros_like(states).index_add(0, found.tokens, weighted.to(states.dtype))

    def expert(self, number: int, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """One expert's output [rows, H] before it is weighted."""
        site = self.first_site + len(MATRICES) * number
        gate, up = self.gate_up[number].chunk(2)
        inner = F.silu(_linear(rows, gate, pieces_at(segments, site)))
        inner = inner * _linear(rows, up, pieces_at(segments, site + 1))
        return _linear(inner, self.down[number], pieces_at(segments, site + 2))


def _linear(rows: Tensor, weight: Tensor, pieces: Sequence[Piece]) -> Tensor:
    return adapted(rows, weight, None, pieces) if pieces else F.linear(rows, weight)


def among(segments: Sequence[Segment], tokens: Sequence[int]) -> list[Segment]:
    """The segments of a pass as they lie in rows of ascending tokens of it; those without a row are left out."""
    found = []
    for segment in segments:
        start = bisect.bisect_left(tokens, segment.start)
        stop = bisect.bisect_left(tokens, segment.stop, start)
        if start < stop:
            found.append(segment._replace(start=start, stop=stop))
    return found


def expert_sites(name: str, module: nn.Module) -> Iterator[Site]:
    """The matrices of the experts that a module named `name` holds, in the order of their sites."""
    gate_up = module.gate_up_proj
    assert isinstance(gate_up, Tensor)
    experts, double, hidden = gate_up.shape
    for number in range(experts):
        for matrix in MATRICES:
            sizes = (double // 2, hidden) if matrix == "down_proj" else (hidden, double // 2)
            yield Site(f"{name}.{number}.{matrix}", *sizes)


@torch.no_grad()
def replacement(module: nn.Module, first_site: int, routing: Routing) -> Experts | None:
    """What computes the same as a module of experts, with adapters; None if it is none, or a trial differs."""
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return None
    experts, double, hidden = gate_up.shape
    if down.shape != (experts, hidden, double // 2):
        return None
    made = Experts(gate_up.detach(), down.detach(), first_site, routing)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TRIAL_ROWS, hidden, generator=generator).to(gate_up)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(TRIAL_ROWS)])
    weights = torch.rand(chosen.shape, generator=generator).to(gate_up)
    trial: Callable[..., Tensor] = module.__call__
    wanted, found = (one(states, chosen.to(gate_up.device), weights) for one in (trial, made))
    tolerance = TOLERANCE.get(gate_up.dtype, 0.0) * max(1.0, float(wanted.abs().max()))
    return made if float((found - wanted).abs().max()) <= tolerance else None
