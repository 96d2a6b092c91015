"""Who holds what of a pass, and with whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.contract.material import supervised
from engines.megatron.constraints import Layout
from engines.megatron.context_parallel import rows_of
from engines.megatron.groups import context_ranks, expert_copies, expert_ranks, make_groups
from engines.megatron.places import Place
from engines.megatron.portions import empty, padded, pooled, portion
from engines.operations import ForwardBackward, LoraSpec
from engines.tuning.collating import Batch, collate
from engines.tuning.lora import Adapter, Segment, Site, size
from tests.megatron.ranks import run_ranks

SPEC = LoraSpec(rank=1, seed=0)
SITES = [Site("lm_head", 4, 4)]


def one_pass() -> Batch:
    """Two runs of 6 and 5 tokens."""
    operations = [
        ForwardBackward([supervised(range(n), range(1, n + 1)) for n in lengths], "cross_entropy", {})
        for lengths in ([2, 4], [5])
    ]
    (batch,) = collate(torch.device("cpu"), operations, 100, together=True)
    return batch


def segments() -> list[Segment]:
    adapters = [Adapter(SITES, SPEC, torch.zeros(size(SITES, SPEC))) for _ in range(2)]
    return [Segment(adapters[0], 0, 6), Segment(adapters[1], 6, 11)]


def test_a_pass_is_padded_to_what_the_ranks_divide() -> None:
    batch = one_pass()
    plain = portion(batch, segments(), None, padded(Layout(), 11))
    assert plain.tokens.shape == (1, 11)
    assert plain.total == 11
    longer = portion(batch, segments(), None, padded(Layout(tensor=4, sequence=True), 11))
    assert longer.tokens.shape == (1, 12)
    assert longer.tokens[0, :11].tolist() == batch.pack.tokens[0].tolist()
    assert longer.targets.shape == (12, 1)
    assert [segment.stop for segment in longer.segments] == [6, 11]
    assert longer.own(torch.ones(11, 1)).flatten().tolist() == [1.0] * 11 + [0.0]
    assert longer.whole(torch.arange(12.0)[:, None]).flatten().tolist() == list(range(11))
    assert padded(Layout(context=3), 13) == 18
    assert padded(Layout(tensor=3, context=2, sequence=True), 13) == 24


def test_a_pass_without_data_is_padding_alone() -> None:
    own = portion(empty(torch.device("cpu")), [], None, 4)
    assert own.tokens.shape == own.positions.shape == (1, 4)
    assert own.targets.shape == (4, 1)
    assert own.whole(torch.ones(4, 1)).shape == (0, 1)
    assert own.own(torch.ones(0, 1)).flatten().tolist() == [0.0] * 4


POOLED = [
    Layout(data=2, expert=2),
    Layout(tensor=2, data=2, expert=4, sequence=True),
    Layout(tensor=2, data=2, expert=2, sequence=True),
    Layout(context=2, data=2, expert=4),
    Layout(tensor=2, context=2, data=1, expert=4, sequence=True),
]


@pytest.mark.parametrize("layout", POOLED, ids=str)
def test_pooled_rows_are_those_of_the_members(layout: Layout) -> None:
    """Against a table of who owns which token of each data rank's pass, cut as the ranks cut it."""
    adapters = [Adapter(SITES, SPEC, torch.zeros(size(SITES, SPEC))) for _ in range(3)]
    held = {
        0: [Segment(adapters[0], 0, 5), Segment(adapters[1], 5, 11)],
        1: [Segment(adapters[1], 0, 2), Segment(adapters[2], 2, 7)],
    }
    count = padded(layout, 11)
    for rank in range(layout.ranks):
        members = Place.of(layout, rank).expert_neighbours()
        wanted: list[int] = []
        for member in members:
            owner = torch.full((count,), -1)
            for segment in held[member.data]:
                owner[segment.start : segment.stop] = adapters.index(segment.adapter)
            own = owner[rows_of(count, layout.context, member.context)] if layout.context > 1 else owner
            wanted += own.chunk(layout.tensor)[member.tensor].tolist() if layout.sequence else own.tolist()
        found = [-1] * len(wanted)
        for segment in pooled(held, members, count):
            for row in range(segment.start, segment.stop):
                assert found[row] == -1
                found[row] = adapters.index(segment.adapter)
        assert found == wanted


def spread() -> None:
    """On each of two ranks: own tokens, positions, targets and segments are those of its rows of the pass."""
    group = dist.group.WORLD
    assert group is not None
    batch = one_pass()
    own = portion(batch, segments(), group, padded(Layout(context=2), 11))
    assert own.rows is not None
    assert own.tokens.shape == (1, 6)  # of 12 tokens, one of them padding
    wanted = [row for row in own.rows.tolist() if row < 11]
    held = [position for position, row in enumerate(own.rows.tolist()) if row < 11]
    for name in ("tokens", "positions"):
        assert getattr(own, name)[0, held].tolist() == getattr(batch.pack, name)[0, wanted].tolist()
    assert own.targets[held].tolist() == batch.targets[wanted].tolist()
    runs = {0: range(6), 1: range(6, 11)}
    covered = []
    for segment in own.segments:
        rows = own.rows[segment.start : segment.stop].tolist()
        assert any(set(rows) <= set(run) for run in runs.values())
        covered += rows
    assert sorted(covered) == sorted(wanted)
    assert own.whole(own.rows[:, None].float()).flatten().tolist() == list(range(11))
    assert own.own(torch.arange(11.0)[:, None])[held].flatten().tolist() == wanted


@pytest.mark.slow
def test_a_pass_is_spread_over_ranks(tmp_path: Path) -> None:
    run_ranks(spread, 2, tmp_path)


def test_groups_are_those_of_places() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2, context=3)
    places = {rank: Place.of(layout, rank) for rank in range(layout.ranks)}
    assert sorted(places.values()) == sorted(set(places.values()))
    for ranks in context_ranks(layout):
        same = {(places[rank].tensor, places[rank].data, places[rank].stage) for rank in ranks}
        assert len(same) == 1
        assert [places[rank].context for rank in ranks] == [0, 1, 2]
    assert sorted(rank for ranks in context_ranks(layout) for rank in ranks) == list(range(24))
    assert sum(place.speaks for place in places.values()) == layout.data
    assert {rank for rank, place in places.items() if place.is_original} == {0, 1, 12, 13}


def test_experts_are_spread_within_a_stage_and_copied_across() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2, expert=2, sequence=True)
    assert list(expert_ranks(layout)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(expert_copies(layout)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    places = [Place.of(layout, rank) for rank in range(layout.ranks)]
    assert [place.experts(6).start for place in places] == [0, 3] * 4
    assert [place.has_original_experts for place in places] == [True, True, False, False] * 2
    for ranks in expert_ranks(layout):
        assert all(places[rank].expert_neighbours() == [places[one] for one in ranks] for rank in ranks)


def test_a_rank_alone_needs_no_groups() -> None:
    assert make_groups(Layout(), 0, 30.0) == (None, None, None)
