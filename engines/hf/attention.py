"""Attention over packed sequences, plugged into Transformers' registry of attention functions.

A pass hands its layout to the model as the keyword `layout`; Transformers passes unknown keywords on to the attention
function, which lets the layout compute. No attention mask is ever built: a layout knows which tokens see which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines.tuning.packed_attention import Layout, PackedLayout

ATTENTION = "tandem_layout"
"""Name under which the attention function is registered. No mask function has that name, so none is built."""


class Unsupported(Exception):
    """The model asks its attention function for something that packed attention does not do."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The function that the models call, with the signature of Transformers' attention functions."""
    if layout is None:
        raise Unsupported("it does not pass keywords on to its attention function")
    refused = [name for name in ("softcap", "s_aux", "position_bias") if extra.get(name) is not None]
    if refused or attention_mask is not None:
        raise Unsupported(f"its attention needs {', '.join(refused) or 'a mask of its own'}")
    if sliding_window is not None and isinstance(layout, ProbeLayout):
        layout.window = min(layout.window or sliding_window, sliding_window)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer, query, key, value, scaling), None


class ProbeLayout(PackedLayout):
    """The layout of the trial pass at load: remembers the smallest sliding window that a layer asked for."""

    window: int | None = None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
