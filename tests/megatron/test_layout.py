"""A layout is proposed with its reason; what is asked is kept, and what is impossible is refused by its constraint."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from engines.interface import LoadError
from engines.megatron.constraints import Layout, refuse_impossible
from engines.megatron.cost_table import QWEN3_8B, QWEN3_235B
from engines.megatron.costs import Workload, memory
from engines.megatron.layout import GIB, Asked, main, propose
from engines.megatron.options import MegatronOptions
from engines.megatron.shapes import ModelShape, parse_shape
from tests.megatron.shapes import encoded

DENSE = parse_shape(encoded("qwen3"))
MOE = parse_shape(encoded("qwen3_moe"))
TINY = Path(__file__).parents[2] / "engines" / "tiny" / "model"


@pytest.mark.parametrize(
    ("shape", "layout", "devices", "message"),
    [
        (DENSE, Layout(tensor=3, data=2), 6, "options.tensor is 3, which does not divide the model's 4 attention heads"
         "; up to 6 it may be 1, 2$"),
        (DENSE, Layout(tensor=4), 4, "options.tensor is 4, .* 2 key and value heads; up to 4 it may be 1, 2$"),
        (msgspec.structs.replace(DENSE, vocabulary=513), Layout(tensor=2), 2, "513 tokens of vocabulary; .* may be 1$"),
        (msgspec.structs.replace(DENSE, ffn=97), Layout(tensor=2), 2, "97 columns of the feed-forward part"),
        (DENSE, Layout(pipeline=3), 3, "options.pipeline is 3, which does not divide the model's 2 layers"),
        (MOE, Layout(expert=3, data=3), 3, "options.expert is 3, which does not divide the model's 8 experts"),
        (MOE, Layout(data=2, expert=4), 2, r"options.expert is 4, .* 2 ranks of a pipeline stage \(tensor 1 × data 2"),
        (MOE, Layout(tensor=2), 2, "options.sequence is false, but a model with experts needs it"),
        (DENSE, Layout(data=2, expert=2), 2, "options.expert is 2, but the model has no experts"),
        (DENSE, Layout(sequence=True), 1, "options.sequence .* options.tensor is 1; turn it off"),
        (DENSE, Layout(tensor=2, pipeline=2), 8, "tensor 2 × pipeline 2 × data 1 × .* are 4 ranks, but there are 8"),
        (DENSE, Layout(data=0), 1, "options.data is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_impossible_layouts_name_the_constraint(
    shape: ModelShape, layout: Layout, devices: int, message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        refuse_impossible(shape, layout, devices)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (DENSE, Layout()),
        (DENSE, Layout(tensor=2, pipeline=2, data=3, context=2)),
        (DENSE, Layout(tensor=2, sequence=True)),
        (MOE, Layout(tensor=2, expert=2, sequence=True)),
        (MOE, Layout(data=2, context=2, expert=4)),
    ],
)
def test_possible_layouts_are_not_refused(shape: ModelShape, layout: Layout) -> None:
    refuse_impossible(shape, layout, layout.ranks)


def test_what_fits_a_device_is_not_cut() -> None:
    found = propose(QWEN3_8B, 4, 80 * GIB)
    assert found.layout == Layout(data=4)
    assert not found.recompute
    assert "no layout cuts the model less" in found.reason


def test_a_model_too_large_for_a_device_is_cut_as_little_as_fits() -> None:
    """Each layout that the proposal passes by needs more memory than there is, by an own look at all of them."""
    usable = 0.9 * 24 * GIB
    found = propose(QWEN3_8B, 8, 24 * GIB, load=Workload(runs=8))
    assert found.memory == memory(QWEN3_8B, found.layout, Workload(runs=8, recompute=found.recompute))
    assert found.memory.total <= usable
    whole = memory(QWEN3_8B, Layout(data=8), Workload(runs=8, recompute=True))
    assert whole.total > usable
    assert found.layout == Layout(tensor=2, data=4, sequence=True)
    assert f"needs {whole.total / GIB:.3g} GiB or more" in found.reason


def test_memory_for_activations_is_won_by_computing_twice_before_the_model_is_cut() -> None:
    found = propose(QWEN3_8B, 1, 24 * GIB)
    assert found.recompute
    once = memory(QWEN3_8B, Layout(), Workload())
    assert f"computing them once it would need {once.total / GIB:.3g} GiB" in found.reason
    with pytest.raises(LoadError, match="no layout fits"):
        propose(QWEN3_8B, 1, 24 * GIB, Asked(recompute=False))


def test_experts_are_spread_over_the_ranks_that_there_are() -> None:
    found = propose(QWEN3_235B, 16, 80 * GIB)
    assert found.layout.expert > 1
    refuse_impossible(QWEN3_235B, found.layout, 16)
    assert found.memory.total <= 0.9 * 80 * GIB


def test_what_is_asked_is_kept_and_the_rest_chosen() -> None:
    found = propose(QWEN3_8B, 8, 80 * GIB, Asked(tensor=2, context=2, recompute=True))
    assert found.layout == Layout(tensor=2, data=2, context=2, sequence=True)
    assert found.recompute
    assert propose(QWEN3_8B, 8, 80 * GIB, Asked(pipeline=4)).layout == Layout(pipeline=4, data=2)
    plain = propose(QWEN3_8B, 8, 80 * GIB, Asked(tensor=2, sequence=False)).layout
    assert plain == Layout(tensor=2, data=4)


def test_tensor_parallel_ranks_stay_in_one_machine() -> None:
    tight = 8 * GIB
    assert propose(QWEN3_8B, 8, tight, load=Workload(tokens=1024), node=8).layout.tensor > 2
    assert propose(QWEN3_8B, 8, tight, load=Workload(tokens=1024), node=2).layout.tensor <= 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(tensor=3), "options.tensor is 3, which does not divide the model's 32 attention heads"),
        (Asked(data=3), "tensor 1 × pipeline 1 × data 3 × context 1 are 3 ranks, but there are 8 devices"),
        (Asked(tensor=2, data=8), "are 16 ranks, but there are 8 devices"),
        (Asked(expert=2), "options.expert is 2, but the model has no experts"),
        (Asked(sequence=True, tensor=1), "options.sequence .* turn it off"),
        (Asked(tensor=0), "options.tensor is 0; it must be at least 1"),
        (Asked(context=-1), "options.context is -1; it must be at least 1"),
    ],
)
def test_impossible_wishes_name_the_constraint(asked: Asked, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        propose(QWEN3_8B, 8, 80 * GIB, asked)


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(
        LoadError, match=r"no layout fits: .* needs \d+ GiB on a device \(weights \d+ GiB"
    ) as caught:
        propose(QWEN3_235B, 4, 80 * GIB)
    assert "90% of 80 GiB" in str(caught.value)
    with pytest.raises(LoadError, match="0 devices"):
        propose(QWEN3_8B, 0, GIB)


def test_the_command_prints_settings_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY), "--devices", "4", "--memory-gib", "16", "--tensor", "2", "--no-sequence"]) == 0
    settings, reason = capsys.readouterr().out.splitlines()
    assert tomllib.loads(settings)["options"] == {
        "tensor": 2, "pipeline": 1, "data": 2, "context": 1, "expert": 1, "sequence": False, "recompute": False,
    }  # fmt: skip
    assert set(tomllib.loads(settings)["options"]) <= set(MegatronOptions.__struct_fields__)
    assert reason.startswith("tensor 2, data 2 needs ")
    assert main([str(TINY), "--devices", "4", "--memory-gib", "16", "--tensor", "4"]) == 1
    assert "2 key and value heads" in capsys.readouterr().err


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; "
        f"sys.argv = ['layout', {str(TINY)!r}, '--devices', '1', '--memory-gib', '1']; "
        "runpy.run_module('engines.megatron.layout', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("options = { tensor = 1")
