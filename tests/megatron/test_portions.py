"""Who holds what of a pass, and with whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.contract.material import supervised
from engines.megatron.constraints import Layout
from engines.megatron.groups import context_ranks, expert_copies, expert_ranks, make_groups
from engines.megatron.places import Place
from engines.megatron.portions import portion
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
    plain = portion(batch, segments(), None, 1)
    assert plain.tokens.shape == (1, 11)
    assert plain.total == 11
    padded = portion(batch, segments(), None, 4)
    assert padded.tokens.shape == (1, 12)
    assert padded.tokens[0, :11].tolist() == batch.pack.tokens[0].tolist()
    assert padded.targets.shape == (12, 1)
    assert [segment.stop for segment in padded.segments] == [6, 11]
    assert padded.own(torch.ones(11, 1)).flatten().tolist() == [1.0] * 11 + [0.0]
    assert padded.whole(torch.arange(12.0)[:, None]).flatten().tolist() == list(range(11))


def spread() -> None:
    """On each of two ranks: own tokens, positions, targets and segments are those of its rows of the pass."""
    group = dist.group.WORLD
    assert group is not None
    batch = one_pass()
    own = portion(batch, segments(), group, 2)
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


def test_a_rank_alone_needs_no_groups() -> None:
    assert make_groups(Layout(), 0) == (None, None, None)
