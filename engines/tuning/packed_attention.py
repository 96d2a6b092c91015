"""Causal attention over packed sequences: no mask is ever built, for a layout knows which tokens see which."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engines.tuning.transfer import to_device

_VARLEN_SETTINGS = inspect.signature(varlen_attn).parameters.keys()


class Layout(Protocol):
    """Who attends to whom in one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """`query` is [B, heads, T, dim], `key` and `value` [B, key/value heads, T, dim]; gives [B, T, heads, dim]."""


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
            self._bounds = to_device(ends, query.device)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        longest = max(self.lengths)
        return causal_varlen(q, k, v, (self._bounds, self._bounds), (longest, longest), scale)[None]


def causal_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Torch's flash attention over sequences that lie one after the other: [T, heads, dim] of `query` [T, heads, dim],
    `key` and `value` [U, key/value heads, dim].

    `bounds` (int32 [N + 1], on the device) are where queries' and keys' sequences begin and the last ones end,
    `longest` the longest of each. A sequence's numbers do not depend on its neighbours, for none is split. Torch 2.11
    has no setting for either: it takes grouped heads as they are, and never splits.
    """
    wanted = {"enable_gqa": query.shape[1] != key.shape[1], "num_splits": 1}
    settings: dict[str, Any] = {name: wanted[name] for name in _VARLEN_SETTINGS & wanted.keys()}
    out = varlen_attn(query, key, value, *bounds, *longest, scale=scale, window_size=(-1, 0), **settings)
    assert isinstance(out, Tensor)
    return out


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
