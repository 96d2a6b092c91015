"""Packed attention and the cache's attention against attention with explicit masks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.hf.kv_cache import CALL_TOKENS, DecodeLayout, KvCache, PrefillLayout, far_longer
from engines.tuning.packed_attention import Group, PackedLayout, group_equal

HEADS, KEY_HEADS, DIM = 4, 2, 8


def states(tokens: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, HEADS, tokens, DIM, generator=generator)
    key, value = (torch.randn(rows, KEY_HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return query, key, value


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention with a boolean mask [T, S], key heads repeated: [1, T, heads, dim]."""
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    weights = (query @ key.transpose(2, 3) * 0.3).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5], [Group(0, 1, 5)]),
        ([3, 3, 3], [Group(0, 3, 3)]),
        ([2, 3, 3, 2], [Group(0, 1, 2), Group(2, 2, 3), Group(8, 1, 2)]),
        ([1, 1], [Group(0, 2, 1)]),
    ],
)
def test_neighbours_of_equal_length_are_one_group(lengths: list[int], groups: list[Group]) -> None:
    assert group_equal(lengths) == groups
    assert groups[-1].stop == sum(lengths)


@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [1, 6, 6, 2, 2, 9], [5, 1, 1, 5]])
def test_a_pack_attends_within_its_sequences(lengths: list[int]) -> None:
    """Expected: one causal block for each sequence in one large mask, values and gradients."""
    total = sum(lengths)
    inputs = [part.requires_grad_(True) for part in states(total, seed=total)]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (owner[:, None] == owner[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    expected = masked(inputs[0], inputs[1], inputs[2], seen)
    found = PackedLayout(lengths).attend(0, inputs[0], inputs[1], inputs[2], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for grad, reference in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 7], [1, 6, 6, 2, 2, 9]])
def test_one_call_for_all_lengths_gives_the_same(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """The kernel needs a GPU; here a loop stands in for it that knows sequences by the bounds that it is given."""
    calls = 0

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, others: Tensor, *longest: int, **more: Any
    ) -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.equal(bounds, others) and bounds.dtype == torch.int32
        assert longest == (max(lengths), max(lengths))
        assert (more["window_size"], more["enable_gqa"], more["num_splits"]) == ((-1, 0), True, 1)
        parts = []
        for start, stop in pairwise(bounds.tolist()):
            q, k, v = (part[start:stop].transpose(0, 1)[None] for part in (query, key, value))
            seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            assert more["scale"] == 0.3
            parts.append(masked(q, k, v, seen)[0])
        return torch.cat(parts)

    query, key, value = states(sum(lengths), seed=2)
    expected = PackedLayout(lengths).attend(0, query, key, value, 0.3)
    monkeypatch.setattr("engines.tuning.packed_attention.varlen_attn", kernel)
    settings = frozenset(["enable_gqa", "num_splits"])
    monkeypatch.setattr("engines.tuning.packed_attention._VARLEN_SETTINGS", settings)
    layout = PackedLayout(lengths)
    layout.attend(0, query, key, value, 0.3)
    assert calls == 0  # it takes 16 bits on a GPU
    monkeypatch.setattr("engines.tuning.packed_attention.fits_varlen", lambda _: True)
    for _ in range(2):
        found = layout.attend(0, query, key, value, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls == 2


def filled(lengths: list[int], limit: int = 64) -> tuple[KvCache, list[tuple[Tensor, Tensor]]]:
    """A cache whose slots hold sequences of these lengths, and the sequences."""
    cache = KvCache(16, limit)
    cache.reserve(len(lengths), max(lengths) + 1)
    _, key, value = states(sum(lengths), seed=3)
    layout = PrefillLayout(lengths)
    layout.attend(5, states(sum(lengths), seed=4)[0], key, value, 0.3)
    stored = []
    start = 0
    for slot, length in enumerate(lengths):
        cache.write(slot, layout.prefix(start, start + length))
        stored.append((key[:, :, start : start + length], value[:, :, start : start + length]))
        start += length
    return cache, stored


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
def test_a_new_token_sees_its_own_slot(order: list[int]) -> None:
    """Rows in any order; each sees what its slot holds and itself. Twice, so that the first token is found again."""
    lengths = [9, 1, 5, 12]
    cache, stored = filled(lengths)
    for step in range(2):
        query, key, value = states(1, seed=20 + step, rows=4)
        held = [length + step for length in lengths]
        inverse = sorted(range(4), key=order.__getitem__)
        layout = DecodeLayout(cache, 0, order, held, torch.tensor([order, inverse, held]))
        found = layout.attend(5, query, key, value, 0.3)
        assert found.shape == (4, 1, HEADS, DIM)
        for row, slot in enumerate(order):
            keys, values = (
                torch.cat([old, new[row : row + 1]], dim=2)
                for old, new in zip(stored[slot], (key, value), strict=True)
            )
            expected = masked(
                query[row : row + 1], keys, values, torch.ones(1, keys.shape[2], dtype=torch.bool)
            )
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
            stored[slot] = (keys, values)


def test_one_slot_alone_sees_the_same() -> None:
    lengths = [9, 1, 5]
    cache, stored = filled(lengths)
    query, key, value = states(1, seed=20)
    layout = DecodeLayout(cache, 2, [0], [5], torch.tensor([[0], [0], [5]]))
    keys, values = (torch.cat([old, new], dim=2) for old, new in zip(stored[2], (key, value), strict=True))
    expected = masked(query, keys, values, torch.ones(1, 6, dtype=torch.bool))
    found = layout.attend(5, query, key, value, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert F.mse_loss(cache.layers[5][0][2, :, :6], keys[0]) == 0


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    cache = KvCache(max_slots=20, max_length=300)
    key, value = states(100, seed=1)[1:]
    cache.reserve(1, 100)
    cache.write(0, {0: (key, value)})
    assert cache.layers[0][0].shape == (8, KEY_HEADS, 128, DIM)
    cache.reserve(9, 129)
    assert cache.layers[0][0].shape == (16, KEY_HEADS, 256, DIM)
    cache.reserve(17, 300)
    assert cache.layers[0][0].shape == (20, KEY_HEADS, 300, DIM)
    assert torch.equal(cache.layers[0][0][0, :, :100], key[0])
    assert torch.equal(cache.layers[0][1][0, :, :100], value[0])
    assert not cache.layers[0][0][1:].any() and not cache.layers[0][0][0, :, 100:].any()
    cache.release()
    assert not cache.layers and (cache.slots, cache.length) == (8, 128)


def test_slots_are_copied_and_cleared() -> None:
    cache, stored = filled([9, 4])
    cache.copy(0, 1, 9)
    keys, values = cache.layers[5]
    assert torch.equal(keys[1, :, :9], stored[0][0][0]) and torch.equal(values[1, :, :9], stored[0][1][0])
    values[0].fill_(float("nan"))
    cache.clear(0)
    assert not keys[0].any() and not values[0].any()
    assert values[1].any()


@pytest.mark.parametrize(
    ("lengths", "apart"),
    [
        ([700], []),
        ([50, 60, 55, 900], [3]),
        ([3000, 60, 2000, 50, 40, 30], [0, 2]),
        ([100, 100, 100, 100], []),
        ([40, CALL_TOKENS + 60], []),
        ([2000, 2000], []),
    ],
)
def test_only_far_longer_slots_attend_apart(lengths: list[int], apart: list[int]) -> None:
    assert far_longer(lengths) == apart


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_no_other_choice_of_the_longest_is_cheaper(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(50):
        lengths = (10 ** (1 + 3 * torch.rand(count, generator=generator))).int().tolist()
        ordered = sorted(lengths, reverse=True)
        costs = [
            sum(ordered[:apart]) + apart * CALL_TOKENS + count * ordered[apart] for apart in range(count)
        ]
        assert costs[len(far_longer(lengths))] == min(costs)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_a_slot_far_longer_than_the_others_sees_all_of_its_own(order: list[int]) -> None:
    lengths = [9, 600, 5, 900]
    cache, stored = filled(lengths, limit=1024)
    query, key, value = states(1, seed=20, rows=4)
    inverse = sorted(range(4), key=order.__getitem__)
    layout = DecodeLayout(cache, 0, order, lengths, torch.tensor([order, inverse, lengths]))
    assert layout.apart == [3, 1] and layout.reach == 10
    found = layout.attend(5, query, key, value, 0.3)
    for row, slot in enumerate(order):
        keys, values = (
            torch.cat([old, new[row : row + 1]], dim=2)
            for old, new in zip(stored[slot], (key, value), strict=True)
        )
        seen = torch.ones(1, keys.shape[2], dtype=torch.bool)
        expected = masked(query[row : row + 1], keys, values, seen)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
