"""Copies of a model step a part each: together every value once, and to the last bit what one rank alone steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from engines.megatron.constraints import Layout
from engines.megatron.moments import ALIGNED, Group, Ownership, owned, ownership, share_of
from engines.operations import OptimStep
from engines.tuning.optimizer import AdamW, Step, take
from tests.megatron.ranks import run_ranks
from tests.megatron.test_sharding import CPU, CUT_IDS, CUTS, SPECS, shardings

SETTINGS = OptimStep(learning_rate=1e-2, grad_clip_norm=3.0, weight_decay=0.1)
STEPS = 3


def ranks(size: int, rank: int) -> dist.ProcessGroup:
    """What is asked of a group that nothing is sent in."""
    return cast(dist.ProcessGroup, SimpleNamespace(size=lambda: size, rank=lambda: rank))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 130, 1000, 4096])
@pytest.mark.parametrize("copies", [1, 2, 3, 8])
def test_each_value_is_stepped_by_one_rank(length: int, copies: int) -> None:
    """In parts that begin where the kernel's do, the first as large as any."""
    piece = slice(10, 10 + length)
    parts = [next(Group(ranks(copies, rank), [piece]).own()) for rank in range(copies)]
    stepped = [place for part in parts for place in range(part.start, part.stop)]
    assert stepped == list(range(10, 10 + length))
    assert all((part.start - 10) % ALIGNED == 0 for part in parts if part.start < part.stop)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) == sizes[0] == share_of(length, copies)
    assert sum(sizes) == length


@pytest.mark.parametrize(("shape", "layout"), CUTS, ids=CUT_IDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"seed {spec.seed}")
def test_what_a_rank_owns_is_told_before_it_is_there(shape: Any, layout: Layout, spec: Any) -> None:
    """The most of any rank, over all ranks with the same factors."""
    copies, expert_copies = layout.data * layout.context, layout.stage_ranks // layout.expert
    for sharding in shardings(layout, shape):
        adapter = sharding.initial(spec, CPU)
        first = ownership(
            sharding,
            adapter,
            ranks(copies, 0) if copies > 1 else None,
            ranks(expert_copies, 0) if expert_copies > 1 else None,
        )
        assert first.count == first.take(adapter.values).numel() == owned(sharding, spec)
        assert first.count <= adapter.values.numel()


def test_a_rank_alone_steps_its_vector_in_place() -> None:
    alone = Ownership(Group(None, [slice(0, 5)]), Group(None, []))
    vector = torch.arange(5.0)
    assert alone.take(vector) is vector
    assert alone.whole(vector, 5) is vector


def stepped(values: torch.Tensor, gradients: list[torch.Tensor], owner: Ownership | None) -> AdamW:
    """Moments after some steps of `values`, clipped by the whole gradients' norms."""
    optimizer = AdamW()
    for gradient in gradients:
        own = values if owner is None else owner.take(values)
        slope = gradient.clone() if owner is None else owner.take(gradient).clone()
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        assert take([Step(optimizer, own, slope, SETTINGS)], [norm]) == [norm]
        if owner is not None:
            owner.put(own, values)
    return optimizer


def beside_each_other() -> None:
    """On each of three ranks: vectors of one piece to the last bit, those of several up to rounding."""
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(3)
    for length in (5, 64, 1003, 4096):
        start = torch.randn(length, generator=generator)
        gradients = [torch.randn(length, generator=generator) for _ in range(STEPS)]
        alone = start.clone()
        moments = stepped(alone, gradients, None)
        assert moments.exp_avg is not None and moments.exp_avg_sq is not None
        for pieces, exact in (([slice(0, length)], True), ([slice(0, 3), slice(3, length)], False)):
            owner = Ownership(Group(group, pieces), Group(None, []))
            found = start.clone()
            own = stepped(found, gradients, owner)
            assert own.steps == STEPS and own.exp_avg is not None and own.exp_avg_sq is not None
            assert own.exp_avg.numel() == owner.count <= share_of(length, 3) + 3
            pairs = [
                (found, alone),
                (owner.whole(own.exp_avg, length), moments.exp_avg),
                (owner.whole(own.exp_avg_sq, length), moments.exp_avg_sq),
            ]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.slow
def test_ranks_that_step_a_part_each_have_what_one_alone_has(tmp_path: Path) -> None:
    run_ranks(beside_each_other, 3, tmp_path)
