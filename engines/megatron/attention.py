"""Attention over packed sequences in the place of megatron-core's own, which takes none without TransformerEngine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.megatron.megatron_core import MegatronModule, PackedSeqParams
from engines.tuning.packed_attention import Layout as AttentionLayout


class Packing(PackedSeqParams):  # type: ignore[misc]  # megatron-core has no types
    """Sequences that lie one after the other, as megatron-core is told of them, and who attends to whom among them."""

    def __init__(self, layout: AttentionLayout, positions: Tensor) -> None:
        """`positions` [T] of this rank's tokens. To megatron-core they are one sequence, each at a place of its own."""
        count = positions.shape[0]
        bounds = torch.tensor([0, count], dtype=torch.int32)  # in main memory: each layer reads them there
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=count,
            max_seqlen_kv=count,
        )
        self.positions = positions
        self.layout = layout


class PackedAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """Causal attention within each sequence of the pass. Takes what megatron-core's own is made with."""

    def __init__(
        self, config: Any, layer_number: int, *given: Any, softmax_scale: float | None = None, **ignored: Any
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packing,
        **ignored: Any,
    ) -> Tensor:
        """[T, heads, size] each, key and value of fewer heads; gives [T, heads * size]."""
        q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
        attended = packed_seq_params.layout.attend(self.layer, q, k, v, self.scale)
        return attended[0].flatten(1)
