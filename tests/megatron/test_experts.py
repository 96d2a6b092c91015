"""Models with experts: the numbers of the engine on Transformers, wherever the experts lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from engines.contract.material import Caller, distance, same
from engines.hf import HfEngine
from engines.megatron.experts import ExpertBlock
from engines.megatron.shapes import parse_shape
from engines.megatron.without_cuda import WithoutCuda
from engines.tuning.lora import Routing
from tests.hf.conftest import EXPERTS, SHAPE, write_tokenizer
from tests.megatron.conftest import configuration, running
from tests.megatron.ranks import run_ranks
from tests.megatron.shapes import encoded
from tests.megatron.test_layouts import beside_and_alone, caller_logprobs, examples, trained
from tests.megatron.test_loading import refused

LAYOUTS: list[dict[str, int]] = [
    {},
    {"tensor": 2, "sequence": True},
    {"data": 2, "expert": 2},
    {"pipeline": 2, "recompute": True},
    {"tensor": 2, "sequence": True, "expert": 2},
    {"context": 2, "expert": 2, "recompute": True},
    {"tensor": 2, "sequence": True, "data": 2, "expert": 2},
    {"data": 2},
]
IDS = [" ".join(f"{name} {size}" for name, size in layout.items()) or "one rank" for layout in LAYOUTS]

SHAPE_4 = parse_shape(
    encoded("qwen3_moe", hidden_size=8, moe_intermediate_size=6, num_experts=4, num_experts_per_tok=1)
)


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Qwen3-MoE: eight experts in each layer, two for a token."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE, **EXPERTS))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in key else 0.05)
    folder = tmp_path_factory.mktemp("moe")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"expert": 2}, "options.expert is 2, which does not divide the 1 ranks of a pipeline stage"),
        ({"expert": 3, "data": 3}, "options.expert is 3, which does not divide the model's 8 experts"),
        ({"tensor": 2, "sequence": False}, "options.sequence is false, but a model with experts needs it"),
        ({"expert": 0}, "options.expert is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    moe_folder: str, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    assert told in refused(moe_folder, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_training_gives_the_numbers_of_transformers(
    layout: dict[str, int], moe_folder: str, tmp_path: Path
) -> None:
    """Clipped by the norm over all experts' factors, and decayed."""
    hf = HfEngine.load(configuration("hf", moe_folder, tmp_path))
    expected, theirs = trained(Caller(hf), "checkpoints/hf", tmp_path)
    with running(moe_folder, tmp_path, pass_tokens=16, **layout) as engine:
        caller = Caller(engine)
        assert distance(caller_logprobs(caller), caller_logprobs(Caller(hf))) < 1e-5
        losses, ours = trained(caller, "checkpoints/megatron", tmp_path)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert distance([ours[name]], [values]) < 1e-4, name


@pytest.mark.slow
def test_a_rank_without_data_computes_its_experts(moe_folder: str, tmp_path: Path) -> None:
    """One datum for two data ranks, which share the experts."""
    hf = Caller(HfEngine.load(configuration("hf", moe_folder, tmp_path)))
    with running(moe_folder, tmp_path, data=2, expert=2, recompute=True) as engine:
        losses = []
        for caller in hf, Caller(engine):
            caller.create("run", rank=4, seed=5)
            losses.append(caller.train(examples(caller)[:1], 4, "run", learning_rate=1e-3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=IDS[1:3])
def test_four_runs_beside_each_other_are_each_what_they_are_alone(
    layout: dict[str, int], moe_folder: str, tmp_path: Path
) -> None:
    """Their rows meet in the experts; to the last bit in deterministic mode, else up to rounding."""
    with running(moe_folder, tmp_path, deterministic=True, **layout) as engine:
        assert all(same(beside, alone) for beside, alone in beside_and_alone(Caller(engine)))
    with running(moe_folder, tmp_path, **layout) as engine:
        assert max(distance(beside, alone) for beside, alone in beside_and_alone(Caller(engine))) < 1e-5


def block(held: range, group: dist.ProcessGroup | None) -> ExpertBlock:
    """Of four experts, which all choose the first one: its router says so."""
    made = ExpertBlock(SHAPE_4, len(held), torch.float32, group)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router, gate_up, down = made.parameters()
        router.zero_()
        router[0] = 1.0
        for own in gate_up, down:
            every = torch.randn(4, own.shape[0] // len(held), own.shape[1], generator=generator)
            own.copy_(every[held.start : held.stop].flatten(0, 1))
    assert made.adapt(0, Routing()) == 3 * len(held)
    return made


def all_choose_one() -> None:
    """On each of two ranks, the second of which holds nothing that is chosen: results and slopes of one block."""
    group = dist.group.WORLD
    assert group is not None
    rank = group.rank()
    x = torch.rand(10, 1, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    slope = torch.randn(10, 1, 8, generator=torch.Generator().manual_seed(3))
    wanted, _ = block(range(4), None)(x)
    wanted.backward(slope)
    half = slice(5 * rank, 5 * rank + 5)
    own = x.detach()[half].clone().requires_grad_()
    found, _ = block(range(2 * rank, 2 * rank + 2), group)(own)
    found.backward(slope[half])
    assert own.grad is not None and x.grad is not None
    torch.testing.assert_close(found, wanted[half])
    torch.testing.assert_close(own.grad, x.grad[half])


def on_processors() -> None:
    with WithoutCuda():
        all_choose_one()


@pytest.mark.slow
def test_a_rank_whose_experts_nobody_chose_takes_part(tmp_path: Path) -> None:
    run_ranks(on_processors, 2, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_where_experts_lie_elsewhere(moe_folder: str, tmp_path: Path) -> None:
    """Saved with its optimizer where two data ranks share the experts; its next losses on one rank, on two tensor ranks
    and on Transformers."""
    with running(moe_folder, tmp_path, data=2, expert=2) as engine:
        caller = Caller(engine)
        data = examples(caller)
        caller.create("run", rank=8, seed=3)
        caller.train(data, 4, "run", learning_rate=1e-3)
        caller.save("checkpoints/half", "run", optimizer_state=True)
        expected = caller.train(data, 4, "run", learning_rate=1e-3)
    start: dict[str, Any] = {"rank": 8, "seed": 9, "folder": "checkpoints/half", "optimizer_state": True}
    found = {}
    for layout in LAYOUTS[1], LAYOUTS[2]:
        with running(moe_folder, tmp_path, **layout) as engine:
            caller = Caller(engine)
            caller.create("run", **start)
            found[str(layout)] = caller.train(data, 4, "run", learning_rate=1e-3)
    caller = Caller(HfEngine.load(configuration("hf", moe_folder, tmp_path)))
    caller.create("run", **start)
    found["hf"] = caller.train(data, 4, "run", learning_rate=1e-3)
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
