"""The page has the table that the script prints; what is sent follows layout and workload."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engines.megatron.constraints import Layout
from engines.megatron.cost_table import QWEN3_8B, QWEN3_235B, table
from engines.megatron.costs import Workload, chunk_rows
from engines.megatron.traffic import Traffic, pass_traffic, stage_traffic

PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"
LOAD = Workload(tokens=1000)
STREAM = 1000 * 4096 * 2


def test_the_page_has_the_table_of_the_script() -> None:
    assert "\n".join(table()) in PAGE.read_text()


def test_one_rank_sends_nothing() -> None:
    assert not list(stage_traffic(QWEN3_8B, Layout(), LOAD, 0, 8))


@pytest.mark.parametrize(("kind", "sent"), [("all_reduce", 150), ("all_gather", 75), ("send", 100)])
def test_a_ring_sums_in_two_rounds_and_gathers_in_one(kind: str, sent: float) -> None:
    each = msgspec.convert({"kind": kind, "ranks": 4, "calls": 1, "size": 100}, Traffic)
    assert each.sent == sent


def test_sequence_parallel_ranks_send_as_much_in_layers_as_tensor_parallel_ones() -> None:
    """A sum is a scattered sum and a gathering. A middle stage has neither table."""
    shape = msgspec.structs.replace(QWEN3_8B, layers=3)
    plain, spread = (
        sum(
            each.sent
            for each in pass_traffic(shape, Layout(tensor=4, pipeline=3, sequence=on), LOAD, 1)
            if each.kind != "send"
        )
        for on in (False, True)
    )
    assert plain == spread == 4 * 2 * STREAM * 3 / 4


def test_a_middle_stage_sends_both_ways() -> None:
    sends = [
        next(
            each.size
            for each in pass_traffic(QWEN3_8B, Layout(pipeline=4), LOAD, stage)
            if each.kind == "send"
        )
        for stage in range(4)
    ]
    assert sends == [STREAM, 2 * STREAM, 2 * STREAM, STREAM]


def test_gradients_are_summed_and_values_told_once_a_step() -> None:
    few, many = (list(stage_traffic(QWEN3_8B, Layout(data=8), LOAD, 0, passes)) for passes in (1, 9))
    assert few == many
    assert [each.kind for each in few] == ["all_reduce", "all_gather"]
    assert few[0].size == few[1].size


def test_experts_that_are_on_one_rank_each_are_not_summed() -> None:
    """Router and experts' factors of 8 of 128 experts lie on each of 16 ranks."""
    sums = [
        each
        for each in stage_traffic(QWEN3_235B, Layout(data=16, expert=16), LOAD, 0, 1)
        if each.kind == "all_reduce"
    ]
    attention = 94 * (3 * 4096 + 8192 + 2 * 512 + 8192 + 4096) + 4096 + 151_936
    assert [each.size for each in sums] == [attention * 32 * 4]
    exchanged = next(
        each
        for each in pass_traffic(QWEN3_235B, Layout(data=16, expert=16), LOAD, 0)
        if each.kind == "all_to_all"
    )
    assert exchanged.size == 94 * 4 * 8 * STREAM


def test_chunks_are_cut_as_log_probs_are() -> None:
    pytest.importorskip("megatron.core")
    from engines.megatron import costs, logprobs

    assert costs.CHUNK_LOGITS == logprobs.CHUNK_LOGITS
    assert chunk_rows(QWEN3_8B, Layout()) == 2**25 // 151_936
