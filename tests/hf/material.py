"""What the tests of the Transformers engine share: short ways to call it, data, and a plain PEFT model beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engines.adapters import initial_a
from engines.hf import HfEngine
from engines.interface import RunOperation, SampleStep, UserError
from engines.operations import (
    AdapterRef,
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SampleResult,
    SaveWeights,
)
from engines.tensors import Tensor

TIED = "Model has `tie_word_embeddings=True`"
"""PEFT warns that merging such an adapter is not possible; the tests do not merge."""
Array = NDArray[Any]


def create(engine: HfEngine, run_id: str = "run", spec: LoraSpec | None = None, **more: Any) -> None:
    outcome = engine.create_runs(
        [RunOperation(run_id, CreateRun(spec or LoraSpec(rank=4, seed=11), **more))]
    )[0]
    if isinstance(outcome, UserError):
        raise outcome


def forward_backward(
    engine: HfEngine,
    data: list[Datum],
    loss: str = "cross_entropy",
    run_id: str = "run",
    config: dict[str, float | str] | None = None,
) -> ForwardResult:
    operation = ForwardBackward(data, loss, config or {})
    outcome = engine.forward_backward([RunOperation(run_id, operation)])[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def forward(
    engine: HfEngine, data: list[Datum], loss: str = "cross_entropy", run_id: str = "run"
) -> ForwardResult:
    outcome = engine.forward([RunOperation(run_id, Forward(data, loss))])[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def step(engine: HfEngine, run_id: str = "run", **settings: Any) -> dict[str, float]:
    outcome = engine.optim_step([RunOperation(run_id, OptimStep(**settings))])[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome.metrics


def train(engine: HfEngine, data: list[Datum], steps: int, run_id: str = "run", rate: float = 5e-3) -> None:
    for _ in range(steps):
        forward_backward(engine, data, run_id=run_id)
        step(engine, run_id, learning_rate=rate)


def saved(engine: HfEngine, run_id: str, folder: str) -> AdapterRef:
    """Save a run's weights for sampling."""
    outcome = engine.save_weights([RunOperation(run_id, SaveWeights(folder))])[0]
    assert not isinstance(outcome, UserError), outcome
    return AdapterRef(adapter_id=folder, folder=folder)


def numbers(tensor: Tensor) -> Array:
    """The tensor's array, for arithmetic."""
    return tensor.array()


def logprobs(result: ForwardResult) -> list[Array]:
    return [numbers(output["logprobs"]) for output in result.outputs]


def request(prompt: Sequence[int] | Array, **settings: Any) -> SampleRequest:
    defaults: dict[str, Any] = {"num_samples": 1, "seed": 5, "max_tokens": 8, "stop_at_eos": False}
    return SampleRequest(prompt=Tensor.of(np.array(prompt, dtype=np.int32)), **{**defaults, **settings})


def sample_all(engine: HfEngine, requests: Sequence[SampleRequest]) -> list[SampleResult]:
    """Run the requests together to their ends."""
    for call_id, wanted in enumerate(requests):
        engine.start_sample(call_id, wanted)
    ends: dict[int, SampleResult] = {}
    drawn: dict[tuple[int, int], list[int]] = {}
    while engine.sampling:
        for event in engine.advance():
            if isinstance(event, SampleStep):
                drawn.setdefault((event.call_id, event.sequence), []).append(event.token.token)
            elif isinstance(event.result, Exception):
                raise event.result
            else:
                ends[event.call_id] = event.result
    for (call_id, index), tokens in drawn.items():
        assert tokens == numbers(ends[call_id].sequences[index].tokens).tolist()
    return [ends[call_id] for call_id in range(len(requests))]


def text(seed: int, length: int) -> Array:
    """Random tokens, int32 [length]."""
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def supervised(lengths: Sequence[int], seed: int = 0) -> list[Datum]:
    """Cross-entropy data with fractional weights, some of them zero or negative."""
    data = []
    for i, length in enumerate(lengths):
        tokens = text(seed * 1000 + i, length + 1)
        weights = np.random.default_rng(seed + i).choice([1.0, 0.5, 0.0, -0.25], length).astype(np.float32)
        inputs = {"target_tokens": Tensor.of(tokens[1:].astype(np.int64)), "weights": Tensor.of(weights)}
        data.append(Datum(Tensor.of(tokens[:-1]), inputs))
    return data


def reinforced(engine: HfEngine, lengths: Sequence[int], run_id: str = "run", seed: int = 0) -> list[Datum]:
    """Policy-gradient data whose ratios spread on both sides of the clipping bounds."""
    data = []
    for i, (plain, length) in enumerate(zip(supervised(lengths, seed), lengths, strict=True)):
        rng = np.random.default_rng(seed + i)
        now = logprobs(forward(engine, [plain], run_id=run_id))[0]
        sampled = (now + rng.uniform(-0.5, 0.5, length)).astype(np.float32)
        inputs = {
            "target_tokens": plain.loss_inputs["target_tokens"],
            "logprobs": Tensor.of(sampled),
            "advantages": Tensor.of(rng.normal(0, 1, length).astype(np.float32)),
        }
        data.append(Datum(plain.tokens, inputs))
    return data


# ---------------------------------------------------------------------------- the independent side


def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def peft_model(folder: str, spec: LoraSpec) -> PeftModel:
    """PEFT's own LoRA on the same layers, starting at the same weights."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"] * spec.train_attn
    names += ["gate_proj", "up_proj", "down_proj"] * spec.train_mlp + ["lm_head"] * spec.train_unembed
    config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), lora_dropout=0.0, target_modules=names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(plain_model(folder), config)
    with torch.no_grad():
        for name, weight in factors(model).items():
            if "lora_A" in name:
                site = name.removesuffix(".lora_A")
                weight.copy_(torch.from_numpy(initial_a(spec.seed, site, spec.rank, weight.shape[1])))
    return model


def factors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Trainable weights by base-model name: `model.layers.0.mlp.up_proj.lora_A`."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def engine_factors(engine: HfEngine, run_id: str = "run") -> dict[str, torch.Tensor]:
    """The same of a run."""
    adapter = engine.runs[run_id].adapter
    found = {}
    for site, pair in zip(adapter.sites, adapter.factors, strict=True):
        if pair is not None:
            found[f"{site.name}.lora_A"] = pair.a.detach()
            found[f"{site.name}.lora_B"] = pair.b.detach()
    return found


def own_logprobs(model: Any, tokens: Sequence[int] | Array, targets: Array) -> torch.Tensor:
    """Log-probs of targets [N] or [N, K] from full logits."""
    logits: torch.Tensor = (
        model(input_ids=torch.tensor(np.array(tokens, dtype=np.int64))[None]).logits[0].float()
    )
    wanted = torch.tensor(np.array(targets, dtype=np.int64)).reshape(len(tokens), -1)
    return logits.log_softmax(-1).gather(1, wanted).reshape(targets.shape)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of two tensors: norm of the difference by norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
