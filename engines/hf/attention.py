"""Attention over packed sequences, plugged into Transformers' registry of attention functions.

A pass hands its layout to the model as the keyword `layout`; Transformers passes unknown keywords on to the attention
function, which lets the layout compute. No attention mask is ever built: a layout knows which tokens see which.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "tandem_layout"
"""Name under which the attention function is registered. No mask function has that name, so none is built."""


class Layout(Protocol):
    """Who attends to whom in one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """`query` is [B, heads, T, dim], `key` and `value` [B, key/value heads, T, dim]; gives [B, T, heads, dim]."""


class Unsupported(Exception):
    """The model asks its attention function for something that packed attention does not do."""


class Group(NamedTuple):
    """`repeats` neighbouring sequences of `length` tokens each, the first one at token `start` of the pack."""

    start: int
    repeats: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.repeats * self.length


def group_equal(lengths: Sequence[int]) -> list[Group]:
    """Neighbouring sequences of equal length are one group: they attend in one call, without padding."""
    groups: list[Group] = []
    start = 0
    for length in lengths:
        last = groups[-1] if groups else None
        if last is not None and last.length == length:
            groups[-1] = last._replace(repeats=last.repeats + 1)
        else:
            groups.append(Group(start, 1, length))
        start += length
    return groups


class PackedLayout:
    """Causal attention within each of several sequences that lie one after the other in a batch of one.

    Where torch has a kernel for sequences of different lengths it is one call; elsewhere one for each group of equal
    lengths.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.groups = group_equal(lengths)
        self._bounds: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if len(self.groups) > 1 and fits_varlen(query):
            return self._attend_at_once(query, key, value, scale)
        # Split, not sliced: the gradient of a split is put together once, those of slices are summed at full length.
        sizes = [group.stop - group.start for group in self.groups]
        own = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
        parts = [_within(group, q, k, v, scale) for group, q, k, v in zip(self.groups, *own, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if self._bounds is None:  # once a pass, without waiting for the device
            ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
            self._bounds = ends.to(query.device, non_blocking=True)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        longest = max(self.lengths)
        out = varlen_attn(
            q,
            k,
            v,
            self._bounds,
            self._bounds,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query.shape[1] != key.shape[1],
            num_splits=1,  # a sequence's numbers do not depend on its neighbours
        )
        assert isinstance(out, Tensor)
        return out[None]


def fits_varlen(query: Tensor) -> bool:
    """Whether torch's flash attention for sequences of different lengths takes it: 16 bits, on Ampere or newer."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    major, _ = torch.cuda.get_device_capability(query.device)
    return major >= 8


def causal(group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The group's part of the result, [1, repeats * length, heads, dim], from the states of a whole pack."""
    q, k, v = (tensor[:, :, group.start : group.stop] for tensor in (query, key, value))
    return _within(group, q, k, v, scale)


def _within(group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same from the group's own states, [1, heads, repeats * length, dim]."""
    gqa = query.shape[1] != key.shape[1]
    q, k, v = (_unpack(tensor, group) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).reshape(1, group.repeats * group.length, query.shape[1], value.shape[-1])


def _unpack(packed: Tensor, group: Group) -> Tensor:
    """[1, heads, repeats * length, dim] to [repeats, heads, length, dim] without copying."""
    return packed[0].view(packed.shape[1], group.repeats, group.length, -1).transpose(0, 1)


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
