"""Rotary positions (Su et al., arXiv:2104.09864), by the position of each token: a pack's sequences begin anew, and a
rank may hold any of their tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engines.megatron.shapes import ModelShape


def frequencies(shape: ModelShape) -> Tensor:
    """Radians by which a position turns each pair of a head's numbers, float32 [head_dim / 2].

    With Llama 3's scaling, frequencies whose wavelength is above `original / low_freq_factor` tokens are divided by
    `factor`, those below `original / high_freq_factor` stay, and between them the two are mixed in proportion (as in
    Transformers' `_compute_llama3_parameters`).
    """
    pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    plain = 1.0 / shape.rope_theta**pairs
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / scaling.factor


class Rotary(nn.Module):
    """In the place of megatron-core's own, which knows no positions but those from 0 on."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        super().__init__()
        self.frequencies = frequencies(shape).to(device)

    def get_rotary_seq_len(self, *given: Any) -> Tensor:
        """What the model hands to `forward`: the positions of the pass's tokens, for its last argument is the pass."""
        positions: Tensor = given[-1].positions
        return positions

    def forward(self, positions: Tensor, **ignored: Any) -> Tensor:
        """Angles float32 [T, 1, 1, head_dim] of tokens at `positions` [T]; the halves of a head turn alike."""
        angles = torch.outer(positions.float(), self.frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
