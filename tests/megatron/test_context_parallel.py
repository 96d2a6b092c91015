"""Attention over spread tokens is attention over the whole pack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engines.megatron.context_parallel import ContextLayout, chunks_of, gather_rows, rows_of, stretches
from engines.tuning.packed_attention import PackedLayout
from tests.megatron.ranks import run_ranks

LENGTHS = [[24], [5, 1, 10, 8], [1] * 24, [11, 13]]
HEADS, KV_HEADS, DIM = 4, 2, 8


def test_every_token_is_held_once_and_work_is_equal() -> None:
    for ranks in (1, 2, 3):
        held = torch.cat([rows_of(24, ranks, rank) for rank in range(ranks)])
        assert sorted(held.tolist()) == list(range(24))
        seen = [int(rows_of(24, ranks, rank).sum()) for rank in range(ranks)]
        assert len(set(seen)) == 1
    with pytest.raises(ValueError, match="25 tokens is not cut into 4 equal chunks"):
        chunks_of(25, 2, 0)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_stretches_cover_what_a_rank_holds(lengths: list[int]) -> None:
    """Each row's keys begin at its sequence and end with itself, by a look at every token."""
    begins = [begin for begin, length in zip(_begins(lengths), lengths, strict=True) for _ in range(length)]
    for rank in range(2):
        rows = rows_of(24, 2, rank).tolist()
        covered = []
        for one in stretches(lengths, 2, rank):
            held = rows[one.start : one.stop]
            assert {begins[row] for row in held} == {one.first}
            assert held == list(range(one.last - len(held), one.last))
            covered += held
        assert covered == rows


def _begins(lengths: list[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths))]


def states() -> list[Tensor]:
    """Queries, keys, values and a slope, the same on each rank: [1, heads, 24, dim]."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, heads, 24, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def spread() -> None:
    """On each rank: results and gradients of its own tokens are those of the whole pack."""
    group = dist.group.WORLD
    assert group is not None
    rows = rows_of(24, group.size(), group.rank())
    for lengths in LENGTHS:
        query, key, value, slope = states()
        slope = slope.transpose(1, 2)
        whole = [tensor.requires_grad_() for tensor in (query, key, value)]
        wanted = PackedLayout(lengths).attend(0, query, key, value, None)
        wanted.backward(slope)
        own = [tensor.detach()[:, :, rows].requires_grad_() for tensor in whole]
        found = ContextLayout(lengths, group).attend(0, own[0], own[1], own[2], None)
        found.backward(slope[:, rows])
        torch.testing.assert_close(found, wanted[:, rows], rtol=0, atol=1e-5)
        for mine, all_of_it in zip(own, whole, strict=True):
            assert mine.grad is not None
            assert all_of_it.grad is not None
            torch.testing.assert_close(mine.grad, all_of_it.grad[:, :, rows], rtol=0, atol=1e-5)


def gather_and_sum() -> None:
    """Rows come to their places, and slopes of all ranks for a row are added where it lies."""
    group = dist.group.WORLD
    assert group is not None
    ranks, rank = group.size(), group.rank()
    order = torch.cat([rows_of(12, ranks, one) for one in range(ranks)])
    own = rows_of(12, ranks, rank).float().requires_grad_()
    pack = gather_rows(own, order, group)
    assert pack.tolist() == list(range(12))
    pack.backward(torch.arange(12.0) * (rank + 1))
    total = sum(one + 1 for one in range(ranks))
    assert own.grad is not None
    assert own.grad.tolist() == (own.detach() * total).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_attention_over_spread_tokens_is_that_of_the_pack(ranks: int, tmp_path: Path) -> None:
    run_ranks(spread, ranks, tmp_path)


@pytest.mark.slow
def test_rows_are_gathered_and_their_slopes_summed(tmp_path: Path) -> None:
    run_ranks(gather_and_sum, 2, tmp_path)


@pytest.mark.slow
def test_a_failing_rank_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank [01] ended with 1:"):
        run_ranks(fail_on_one, 2, tmp_path)


def fail_on_one() -> None:
    assert dist.get_rank() == 0
