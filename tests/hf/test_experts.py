"""Adapters on experts: against the plain model with each expert's matrices changed by hand, and run beside run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from engines.adapters import initial_a
from engines.interface import LoadError, RunOperation, UserError
from engines.operations import (
    Datum,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    LoraSpec,
    OptimStep,
    SaveWeights,
)
from engines.tensors import Tensor as Bytes
from engines.tuning.experts import Experts, gather, replacement
from engines.tuning.lora import Routing
from tests.hf.conftest import EXPERTS, SHAPE, MakeEngine, write_tokenizer
from tests.hf.material import (
    create,
    forward,
    forward_backward,
    logprobs,
    numbers,
    request,
    sample_all,
    saved,
    step,
    supervised,
    train,
)

SPEC = LoraSpec(rank=4, seed=11, alpha=8.0)
EXPERT = "model.layers.0.mlp.experts"


class ByHand:
    """The plain model; a matrix W is W + 2 B A of leaves, and autograd does the rest."""

    def __init__(self, folder: str) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        self.model.requires_grad_(False)
        self.leaves: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 3:
                for expert in range(parameter.shape[0]):
                    for matrix in ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",):
                        rows, columns = parameter.shape[1:]
                        self._leaf(
                            f"{name.rpartition('.')[0]}.{expert}.{matrix}",
                            rows // (2 if "gate_up" in name else 1),
                            columns,
                        )
            elif "_proj" in name or name == "lm_head.weight":
                self._leaf(name.removesuffix(".weight"), *parameter.shape)
        self.optimizer = torch.optim.AdamW(
            self.leaves.values(), lr=5e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
        )

    def _leaf(self, name: str, outputs: int, inputs: int) -> None:
        start = initial_a(SPEC.seed, name, SPEC.rank, inputs)
        self.leaves[f"{name}.A"] = torch.from_numpy(start).requires_grad_()
        self.leaves[f"{name}.B"] = torch.zeros(outputs, SPEC.rank, requires_grad=True)

    def _delta(self, name: str) -> Tensor:
        return 2.0 * self.leaves[f"{name}.B"] @ self.leaves[f"{name}.A"]

    def _changed(self) -> dict[str, Tensor]:
        changed = {}
        for name, parameter in self.model.named_parameters():
            module = name.rpartition(".")[0]
            if parameter.dim() == 3:
                names = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                deltas = [
                    torch.cat([self._delta(f"{module}.{expert}.{matrix}") for matrix in names])
                    for expert in range(parameter.shape[0])
                ]
                changed[name] = parameter + torch.stack(deltas)
            elif f"{module}.A" in self.leaves:
                changed[name] = parameter + self._delta(module)
        return changed

    def logprobs(self, data: list[Datum]) -> list[Tensor]:
        changed = self._changed()
        found = []
        for datum in data:
            tokens = torch.tensor(numbers(datum.tokens).astype(np.int64))[None]
            targets = torch.tensor(numbers(datum.loss_inputs["target_tokens"]))
            logits = functional_call(self.model, changed, (tokens,)).logits[0]
            found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        return found

    def step(self, data: list[Datum]) -> float:
        weights = [torch.tensor(numbers(datum.loss_inputs["weights"])) for datum in data]
        parts = zip(weights, self.logprobs(data), strict=True)
        loss = -torch.stack([(weight * own).sum() for weight, own in parts]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_ten_steps_equal_those_of_matrices_changed_by_hand(
    make_engine: MakeEngine, model_folders: dict[str, str], tmp_path: Path
) -> None:
    engine, reference = make_engine("moe"), ByHand(model_folders["moe"])
    create(engine, spec=SPEC)
    data = supervised([19, 7, 12], seed=4)
    for found, wanted in zip(logprobs(forward(engine, data)), reference.logprobs(data), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=0, atol=1e-5)
    for _ in range(10):
        loss = forward_backward(engine, data).metrics["loss:sum"]
        step(engine, learning_rate=5e-3)
        assert loss == pytest.approx(reference.step(data), rel=1e-4)
    folder = saved(engine, "run", "versions/one").folder
    written = load_file(tmp_path / "storage" / folder / "adapter_model.safetensors")
    assert len(written) == len(reference.leaves)
    assert sum(EXPERT in name for name in written) == 2 * 3 * EXPERTS["num_experts"]
    for name, leaf in reference.leaves.items():
        factor = written[f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight"]
        assert relative(factor, leaf.detach()) <= 1e-4, name


def test_runs_do_not_meet_in_an_expert(make_engine: MakeEngine) -> None:
    """Three runs in one pass, each as if it were alone."""
    engine = make_engine("moe")
    names = ["one", "two", "three"]
    data = {name: supervised([9, 14, 5], seed=number) for number, name in enumerate(names)}
    for number, name in enumerate(names):
        for run_id in (name, f"{name} alone"):
            create(engine, run_id, LoraSpec(rank=2 + number, seed=number))
    for _ in range(3):
        together = engine.forward_backward(
            [RunOperation(name, ForwardBackward(data[name], "cross_entropy", {})) for name in names]
        )
        engine.optim_step([RunOperation(name, OptimStep(learning_rate=5e-3)) for name in names])
        for name, outcome in zip(names, together, strict=True):
            assert isinstance(outcome, ForwardResult)
            alone = forward_backward(engine, data[name], run_id=f"{name} alone")
            step(engine, f"{name} alone", learning_rate=5e-3)
            for found, wanted in zip(logprobs(outcome), logprobs(alone), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    for name in names:
        beside, by_itself = (engine.runs[run_id].adapter.values for run_id in (name, f"{name} alone"))
        assert relative(beside, by_itself) <= 1e-5


def test_computing_activations_twice_gives_the_same(make_engine: MakeEngine) -> None:
    data = supervised([9, 14], seed=8)
    losses = []
    for checkpointing in (False, True):
        engine = make_engine("moe", checkpointing=checkpointing)
        create(engine, spec=SPEC)
        train(engine, data, 2)
        losses.append(forward_backward(engine, data).metrics["loss:sum"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_checkpoint_goes_on_where_it_was_saved(make_engine: MakeEngine) -> None:
    engine, data = make_engine("moe"), supervised([11, 8], seed=2)
    for run_id in ("first", "second"):
        create(engine, run_id, SPEC)
    train(engine, data, 2, "first")
    (wrote,) = engine.save_weights([RunOperation("first", SaveWeights("kept", optimizer_state=True))])
    assert not isinstance(wrote, UserError)
    (read,) = engine.load_weights([RunOperation("second", LoadWeights("kept", optimizer_state=True))])
    assert not isinstance(read, UserError)
    for run_id in ("first", "second"):
        train(engine, data, 1, run_id)
    assert torch.equal(engine.runs["first"].adapter.values, engine.runs["second"].adapter.values)


def test_what_is_sampled_has_the_trainers_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine("moe")
    create(engine, spec=SPEC)
    train(engine, supervised([19, 7, 12], seed=4), 3)
    version = saved(engine, "run", "versions/one")
    prompt = [5, 9, 200, 31]
    (drawn,) = sample_all(engine, [request(prompt, max_tokens=12, adapter=version)])
    tokens = numbers(drawn.sequences[0].tokens)
    whole = np.concatenate([np.array(prompt, dtype=np.int32), tokens])
    datum = Datum(
        Bytes.of(whole[:-1]),
        {
            "target_tokens": Bytes.of(whole[1:].astype(np.int64)),
            "weights": Bytes.of(np.ones(len(whole) - 1, np.float32)),
        },
    )
    trained = logprobs(forward(engine, [datum]))[0][len(prompt) - 1 :]
    np.testing.assert_allclose(numbers(drawn.sequences[0].logprobs), trained, rtol=0, atol=1e-4)


def test_rows_are_gathered_by_expert() -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    found = gather(chosen, experts=5)
    assert found.bounds == [0, 2, 2, 4, 6, 6]
    assert found.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert chosen.reshape(-1)[found.slots].tolist() == [0, 0, 2, 2, 3, 3]


def test_choices_of_experts_that_are_elsewhere_are_left_out() -> None:
    found = gather(torch.tensor([[2, 0], [0, 1]]), experts=2)
    assert found.bounds == [0, 2, 3]
    assert found.tokens.tolist() == [0, 1, 1]
    assert found.slots.tolist() == [1, 2, 3]


def test_only_what_computes_the_same_is_replaced() -> None:
    module = Qwen3MoeExperts(Qwen3MoeConfig(**SHAPE, **EXPERTS))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    assert isinstance(replacement(module, 0, Routing()), Experts)
    module.act_fn = nn.GELU()
    assert replacement(module, 0, Routing()) is None
    assert replacement(nn.Linear(3, 3), 0, Routing()) is None


def test_experts_of_another_kind_are_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    """They have biases, and their matrices lie otherwise."""
    sizes = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = tmp_path / "other"
    GptOssForCausalLM(GptOssConfig(**sizes)).save_pretrained(folder)
    write_tokenizer(folder)
    with pytest.raises(LoadError):
        make_engine(str(folder))
