"""What is recorded and replayed, as far as it needs no device; tests/hf/test_on_cuda.py replays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engines.hf.decode_graphs import (
    REACH,
    DecodeGraphs,
    GraphedLayout,
    Group,
    Numbers,
    filled_up,
    grouped,
    rounded_groups,
    rounded_reach,
    rounded_rows,
)
from engines.hf.kv_cache import DecodeLayout, KvCache
from engines.operations import AdapterRef, LoraSpec
from engines.tuning.lora import Adapter, Site, size
from tests.hf.conftest import MakeEngine
from tests.hf.material import create, numbers, request, sample_all, saved, text

SITES = [Site("model.layers.0.self_attn.q_proj", 8, 8)]


@pytest.mark.parametrize(
    ("count", "rows", "groups"),
    [(1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8), (8, 8, 8), (9, 16, 16), (17, 24, 32), (64, 64, 64)],
)
def test_forms_are_rounded_up(count: int, rows: int, groups: int) -> None:
    assert (rounded_rows(count), rounded_groups(count)) == (rows, groups)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000, 1024, 1025, 5000, 40_000])
def test_reach_is_rounded_by_little(tokens: int) -> None:
    reach = rounded_reach(tokens)
    assert tokens <= reach < tokens + max(REACH, tokens / 7)
    assert rounded_reach(reach) == reach


def test_neighbours_with_an_adapter_are_a_group() -> None:
    spec = LoraSpec(8, 0)
    a, b = (Adapter(SITES, spec, torch.zeros(size(SITES, spec))) for _ in range(2))
    assert grouped([a, a, None, b, b, b]) == [Group(a, 2), Group(None, 3), Group(b, 6)]
    assert grouped([None]) == [Group(None, 1)]


def test_rows_that_fill_up_use_the_slots_behind() -> None:
    numbers = Numbers([7, 8], [3, 5], [1, 0], [1, 0], [5, 3])
    assert filled_up(numbers, 4) == [[7, 8, 0, 0], [3, 5, 0, 0], [1, 0, 2, 3], [1, 0, 2, 3], [5, 3, 0, 0]]


def test_a_filled_up_step_attends_like_the_step_itself() -> None:
    """More rows and a longer reach than there are sequences change nothing for those that there are."""
    torch.manual_seed(0)
    order, lengths = [2, 0, 1], [4, 9, 2]
    inverse = sorted(range(3), key=order.__getitem__)
    numbers = Numbers([0] * 3, [lengths[slot] for slot in order], order, inverse, lengths)
    query, key, value = (torch.randn(8, heads, 1, 16) for heads in (4, 2, 2))
    caches = []
    for _ in range(2):
        cache = KvCache(8, 64)
        cache.at(0, key, value)
        for tensors in cache.layers[0]:
            tensors[:3].copy_(torch.randn(3, *tensors.shape[1:], generator=torch.Generator().manual_seed(1)))
        caches.append(cache)
    plain = DecodeLayout(caches[0], 0, order, lengths, torch.tensor([order, inverse, lengths]))
    expected = plain.attend(0, query[:3], key[:3], value[:3], 0.25)
    layout = GraphedLayout(caches[1], torch.tensor(filled_up(numbers, 8))[2:], 32, in_order=False)
    found = layout.attend(0, query, key, value, 0.25)
    torch.testing.assert_close(found[:3], expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(caches[0].layers[0], caches[1].layers[0], strict=True):
        assert torch.equal(one[:3], other[:3])


def test_nothing_is_recorded_without_cuda(make_engine: MakeEngine) -> None:
    engine = make_engine("untied")
    graphs = DecodeGraphs(engine.base, engine.decoder.cache)
    assert not graphs.possible
    assert graphs.run(Numbers([1], [0], [0], [0], [0]), [None]) is None


def test_a_small_cache_stays_where_it_is() -> None:
    cache = KvCache(8, 64)
    states = torch.zeros(1, 2, 1, 16)
    cache.at(0, states, states)
    before = cache.generation
    cache.release(1 << 30)
    assert cache.layers and cache.generation == before
    cache.release()
    assert not cache.layers and cache.generation > before


class Replayed:
    """Stands in for a graph: computes the recorded step again, into the same memory."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self.step = step
        self.hidden = step().clone()

    def replay(self) -> None:
        self.hidden.copy_(self.step())


@pytest.mark.parametrize("ranks", [(), (8,), (8, 8, 8), (8, 16)], ids=str)
def test_replayed_steps_decode_what_others_do(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]
) -> None:
    """Of sequences on the base model and on adapters, which begin and end at different times. Steps with adapters of
    two shapes are not recorded. On the CPU, where recording is computing again."""
    monkeypatch.setattr("engines.hf.model.takes_groups", lambda _: True)
    replays = []

    def captured(step: Callable[[], torch.Tensor]) -> tuple[Replayed, torch.Tensor]:
        graph = Replayed(step)
        replays.append(graph)
        return graph, graph.hidden

    found = []
    for recording in (True, False):
        engine = make_engine("untied")
        engine.decoder.graphs.possible = recording
        monkeypatch.setattr(engine.decoder.graphs, "_captured", captured)
        adapters: list[AdapterRef | None] = [None]
        for number, rank in enumerate(ranks):
            create(engine, f"run{number}", LoraSpec(rank, seed=number))
            values = engine.runs[f"run{number}"].adapter.values
            values.add_(
                torch.randn(values.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05
            )
            adapters.append(saved(engine, f"run{number}", f"run{number}-{recording}"))
        wanted = [
            request(
                text(number, 4 + 2 * number),
                temperature=0.0,
                max_tokens=8 + 3 * (number % 4),
                adapter=adapters[number % len(adapters)],
            )
            for number in range(9)
        ]
        results = [*sample_all(engine, wanted[:2]), *sample_all(engine, wanted)]
        found.append(
            [(numbers(one.sequences[0].tokens), numbers(one.sequences[0].logprobs)) for one in results]
        )
    for (tokens, logprobs), (others, expected) in zip(*found, strict=True):
        assert np.array_equal(tokens, others)
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    assert replays
