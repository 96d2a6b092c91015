"""Keys and values of the sequences that are being decoded, one slot each, and the attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.tuning.packed_attention import Group, PackedLayout, causal, fits_varlen

FIRST_SLOTS = 8
FIRST_LENGTH = 128
CALL_TOKENS = 256
"""Tokens that one sequence could attend to in the time that another call takes."""

Prefix = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of one prompt, [1, heads, N, dim], for each layer."""


class KvCache:
    """Keys and values as [slots, heads, length, dim] for each layer.

    It grows by doubling, in slots and in length, and never beyond the limits given. Memory that no sequence has
    written holds zeros: what is masked out must still be finite.
    """

    def __init__(self, max_slots: int, max_length: int) -> None:
        self.max_slots = max_slots
        self.max_length = max_length
        self.slots = min(FIRST_SLOTS, max_slots)
        self.length = min(FIRST_LENGTH, max_length)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.generation = 0
        """Changes whenever the layers' tensors do."""

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many slots and tokens."""
        wanted = (_grown(self.slots, slots, self.max_slots), _grown(self.length, length, self.max_length))
        if wanted == (self.slots, self.length):
            return
        for layer, tensors in self.layers.items():
            self.layers[layer] = tuple(_enlarged(tensor, *wanted) for tensor in tensors)  # type: ignore[assignment]
        self.slots, self.length = wanted
        self.generation += 1

    def release(self, keep: int = 0) -> None:
        """Give the memory back, if it is more than so many bytes; nothing is being decoded."""
        if sum(tensor.nbytes for tensors in self.layers.values() for tensor in tensors) <= keep:
            return
        self.layers.clear()
        self.generation += 1
        self.slots = min(FIRST_SLOTS, self.max_slots)
        self.length = min(FIRST_LENGTH, self.max_length)

    def at(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's two tensors; made, in the form of `key` and `value` [_, heads, _, dim], when first asked for."""
        if layer not in self.layers:
            self.layers[layer] = tuple(  # type: ignore[assignment]
                new.new_zeros((self.slots, new.shape[1], self.length, new.shape[3])) for new in (key, value)
            )
        return self.layers[layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` tokens of slot `source`."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold numbers that are not finite."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[slot] = 0

    def write(self, slot: int, prefix: Prefix) -> None:
        """Give a slot the keys and values of a prompt."""
        for layer, parts in prefix.items():
            for tensor, part in zip(self.at(layer, *parts), parts, strict=True):
                tensor[slot, :, : part.shape[2]] = part[0]


def _grown(size: int, wanted: int, limit: int) -> int:
    while size < wanted:
        size = min(2 * size, limit)
    return size


def _enlarged(tensor: Tensor, slots: int, length: int) -> Tensor:
    """One that is larger already, because memory ran out while the layers grew, is cut: what is behind is not used."""
    grown = tensor.new_zeros((slots, tensor.shape[1], length, tensor.shape[3]))
    kept = tensor[:slots, :, :length]
    grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown


class PrefillLayout(PackedLayout):
    """Packed prompts whose keys and values are kept. Of a prompt with a past, only what follows it is in the pack."""

    def __init__(self, lengths: Sequence[int], pasts: Sequence[Prefix | None] = ()) -> None:
        """`lengths` are the tokens in the pack; without `pasts` all prompts are whole."""
        super().__init__(lengths)
        self.kept: Prefix = {}
        self.continued: dict[int, _Continued] = {}
        if any(past is not None for past in pasts):
            self.groups = []
            self._lay_out(lengths, pasts)

    def _lay_out(self, lengths: Sequence[int], pasts: Sequence[Prefix | None]) -> None:
        start = 0
        for length, past in zip(lengths, pasts, strict=True):
            last = self.groups[-1] if self.groups else None
            if past is not None:
                self.continued[start] = _Continued(length, past)
            if (
                past is None
                and last is not None
                and last.length == length
                and last.start not in self.continued
            ):
                self.groups[-1] = last._replace(repeats=last.repeats + 1)
            else:
                self.groups.append(Group(start, 1, length))
            start += length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.kept[layer] = (key, value)
        if not self.continued and len(self.groups) > 1 and fits_varlen(query):
            return self._attend_at_once(query, key, value, scale)
        parts = [self._part(group, layer, query, key, value, scale) for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _part(
        self, group: Group, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        continued = self.continued.get(group.start)
        if continued is None:
            return causal(group, query, key, value, scale)
        own = slice(group.start, group.stop)
        return continued.attend(layer, query[:, :, own], key[:, :, own], value[:, :, own], scale)

    def prefix(self, start: int, stop: int) -> Prefix:
        """Keys and values of the whole prompt at the pack's tokens [start, stop); views, but for one with a past."""
        if start in self.continued:
            return self.continued[start].whole
        return {
            layer: (key[:, :, start:stop], value[:, :, start:stop])
            for layer, (key, value) in self.kept.items()
        }


class _Continued:
    """`length` tokens that follow a past: each sees the past, those before it, and itself."""

    def __init__(self, length: int, past: Prefix) -> None:
        self.past = past
        self.whole: Prefix = {}
        keys, _ = next(iter(past.values()))
        before = keys.shape[2]
        self.mask = torch.ones((length, before + length), dtype=torch.bool, device=keys.device).tril_(before)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        keys, values = (
            torch.cat([old, new], dim=2) for old, new in zip(self.past[layer], (key, value), strict=True)
        )
        self.whole[layer] = (keys, values)
        gqa = query.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.mask, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)


class DecodeLayout:
    """One new token for each of the slots [first, first + n): it sees the slot's tokens and itself.

    `order[i]` is the slot, counted from `first`, of row i of the batch: rows are sorted by adapter, slots are not.
    `lengths` [n] are the tokens that each *slot* holds already.
    """

    def __init__(
        self, cache: KvCache, first: int, order: Sequence[int], lengths: Sequence[int], batch: Tensor
    ) -> None:
        count = len(order)
        self.cache = cache
        self.slots = slice(first, first + count)
        self.apart = far_longer(lengths)
        self.reaches = [lengths[slot] + 1 for slot in self.apart]
        self.reach = max(length for slot, length in enumerate(lengths) if slot not in self.apart) + 1
        self.sorted = list(order) == list(range(count))
        self.place(batch)

    def place(self, batch: Tensor) -> None:
        """What each row of the batch writes and sees: `batch` are order, its inverse, and lengths, int64 [3, n] on the
        device."""
        self.order, self.inverse, held = batch
        self.index = self.order + self.slots.start
        self.positions = held[self.order]
        beyond = torch.arange(self.reach, device=batch.device) > held[:, None]
        self.mask = torch.zeros(beyond.shape, device=batch.device).masked_fill_(beyond, float("-inf"))[
            :, None, None
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        keys, values = self.cache.at(layer, key, value)
        keys[self.index, :, self.positions] = key[:, :, 0]
        values[self.index, :, self.positions] = value[:, :, 0]
        if self.mask.dtype != query.dtype:
            self.mask = self.mask.to(query.dtype)
        rows, heads = query.shape[:2]
        by_slot = query if self.sorted else query[self.inverse]
        grouped = by_slot.reshape(rows, keys.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(
            grouped,
            keys[self.slots, :, : self.reach],
            values[self.slots, :, : self.reach],
            attn_mask=self.mask,
            scale=scale,
        )
        for slot, reach in zip(self.apart, self.reaches, strict=True):
            own = slice(self.slots.start + slot, self.slots.start + slot + 1)
            out[slot] = F.scaled_dot_product_attention(
                grouped[slot : slot + 1], keys[own, :, :reach], values[own, :, :reach], scale=scale
            )[0]
        out = out.reshape(rows, 1, heads, -1)
        return out if self.sorted else out[self.order]


def far_longer(lengths: Sequence[int]) -> list[int]:
    """The slots that attend in calls of their own: so much longer than the others that it is cheaper than having all
    slots attend as far. The longest ones, never all."""
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    best, least, spent = 0, len(lengths) * lengths[longest[0]], 0
    for count, (slot, following) in enumerate(pairwise(longest), start=1):
        spent += lengths[slot] + CALL_TOKENS
        cost = spent + len(lengths) * lengths[following]
        if cost < least:
            best, least = count, cost
    return longest[:best]
