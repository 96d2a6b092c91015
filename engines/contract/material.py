"""What the contract's tests are written with: short ways to call an engine, and data that fit any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from engines.adapters import ADAPTER_WEIGHTS
from engines.interface import Engine, EngineInfo, RunOperation, SampleEnd, SampleEvent, SampleStep, UserError
from engines.operations import (
    AdapterRef,
    CreateRun,
    CreateRunResult,
    Datum,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    LoraSpec,
    LossConfig,
    OptimStep,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SaveWeights,
    SaveWeightsResult,
    TopLogprobs,
)
from engines.tensors import Tensor

Array = NDArray[Any]
EngineFactory = Callable[[], Engine]
Reference = Callable[[Sequence[int]], Array]
"""Logits [N, V] of the base model for N tokens, by a computation that is not the engine's."""
T = TypeVar("T")

NO_CONFIG: LossConfig = {}


class Caller:
    """An engine, called for one run at a time; a refused operation raises its UserError."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info: EngineInfo = engine.info()

    def create(self, run_id: str = "run", rank: int = 4, seed: int = 1, **settings: Any) -> CreateRunResult:
        """`settings` belong to the LoraSpec, but for `folder` and `optimizer_state`."""
        start = {name: settings.pop(name) for name in ("folder", "optimizer_state") if name in settings}
        # Not every engine can adapt the unembedding.
        lora = LoraSpec(rank, seed, **{"train_unembed": self.info.train_unembed, **settings})
        return only(self.engine.create_runs([RunOperation(run_id, CreateRun(lora, **start))]))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: LossConfig = NO_CONFIG,
        *,
        run_id: str = "run",
    ) -> ForwardResult:
        operation = ForwardBackward(list(data), loss, config)
        return only(self.engine.forward_backward([RunOperation(run_id, operation)]))

    def forward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: LossConfig = NO_CONFIG,
        *,
        run_id: str = "run",
    ) -> ForwardResult:
        return only(self.engine.forward([RunOperation(run_id, Forward(list(data), loss, config))]))

    def step(self, run_id: str = "run", **settings: float) -> float:
        """One optimizer step; gives the gradient norm that the engine tells."""
        settings = {"learning_rate": 1e-2, **settings}
        result = only(self.engine.optim_step([RunOperation(run_id, OptimStep(**settings))]))
        return result.metrics["unclipped_grad_l2:mean"]

    def train(self, data: Sequence[Datum], steps: int, run_id: str = "run", **settings: float) -> list[float]:
        """Some steps of cross-entropy; gives the losses before each of them."""
        losses = []
        for _ in range(steps):
            losses.append(self.forward_backward(data, run_id=run_id).metrics["loss:sum"])
            self.step(run_id, **settings)
        return losses

    def save(self, folder: str, run_id: str = "run", optimizer_state: bool = False) -> SaveWeightsResult:
        return only(self.engine.save_weights([RunOperation(run_id, SaveWeights(folder, optimizer_state))]))

    def load(self, folder: str, run_id: str = "run", optimizer_state: bool = False) -> None:
        only(self.engine.load_weights([RunOperation(run_id, LoadWeights(folder, optimizer_state))]))

    def logprobs(self, data: Sequence[Datum], run_id: str = "run") -> list[Array]:
        """Log-probs of each datum's targets."""
        return logprobs(self.forward(data, run_id=run_id))

    def score(self, tokens: Sequence[int], run_id: str = "run") -> Array:
        """Log-prob of each token after the first, given those before it."""
        return self.logprobs([supervised(tokens[:-1], tokens[1:])], run_id)[0]

    def score_tokens(self, tokens: Sequence[int], targets: Array, run_id: str = "run") -> Array:
        """Log-prob of each of K targets [N, K] after each of N tokens."""
        return self.logprobs([supervised(tokens, targets)], run_id)[0]

    def snapshot(self, folder: str, run_id: str = "run") -> AdapterRef:
        """The run's weights as an adapter to sample."""
        self.save(folder, run_id)
        return AdapterRef(adapter_id=folder, folder=folder)

    def sample(self, *requests: SampleRequest) -> list[SampleResult]:
        """Run requests together to their ends. Raises the UserError of one that could not be carried on."""
        for call_id, request in enumerate(requests):
            self.engine.start_sample(call_id, request)
        ends = {event.call_id: event.result for event in self.drain() if isinstance(event, SampleEnd)}
        results = []
        for call_id in range(len(requests)):
            result = ends[call_id]
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def drain(self) -> list[SampleEvent]:
        """Everything that comes until nothing is being sampled."""
        events: list[SampleEvent] = []
        while self.engine.sampling:
            events += self.engine.advance()
        return events


def only(outcomes: Sequence[T | UserError]) -> T:
    """The result of a call with one operation; raises its UserError."""
    (outcome,) = outcomes
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


# ---------------------------------------------------------------------------- data


def text(info: EngineInfo, length: int, seed: int = 0) -> list[int]:
    """Random tokens that end no sequence."""
    drawn = np.random.default_rng([seed, length]).permuted(np.resize(ordinary(info), max(length, 512)))
    return [int(token) for token in drawn[:length]]


def ordinary(info: EngineInfo) -> Array:
    """Up to 512 tokens of the vocabulary without those that end a sequence."""
    spread = np.linspace(0, info.vocab_size - 1, min(info.vocab_size, 512)).astype(np.int64)
    return np.setdiff1d(spread, np.array(info.eos_tokens, dtype=np.int64))


def supervised(
    tokens: Sequence[int], targets: Sequence[int] | Array, weights: Sequence[float] | Array | None = None
) -> Datum:
    """A cross-entropy datum; every target weighs 1 when no weights are given."""
    wanted = np.asarray(targets, dtype=np.int64)
    given = np.ones(wanted.shape) if weights is None else np.asarray(weights)
    inputs = {"target_tokens": Tensor.of(wanted), "weights": Tensor.of(given.astype(np.float32))}
    return Datum(Tensor.of(np.array(tokens, dtype=np.int32)), inputs)


def batch(info: EngineInfo, lengths: Sequence[int] = (7, 12, 3), seed: int = 0) -> list[Datum]:
    """Cross-entropy data with fractional, zero and negative weights."""
    data = []
    for i, length in enumerate(lengths):
        tokens = text(info, length + 1, seed * 100 + i)
        weights = np.random.default_rng(seed * 100 + i).choice([1.0, 1.0, 0.5, 0.0, -0.25], length)
        data.append(supervised(tokens[:-1], tokens[1:], weights))
    return data


def policy_batch(caller: Caller, lengths: Sequence[int] = (9, 5, 1), run_id: str = "run") -> list[Datum]:
    """Policy-gradient data whose ratios lie inside and on both sides of the usual clipping bounds."""
    data = []
    for i, plain in enumerate(batch(caller.info, lengths, seed=7)):
        rng = np.random.default_rng(i)
        now = caller.logprobs([plain], run_id)[0]
        behind = rng.choice([-0.7, -0.4, -0.1, 0.0, 0.1, 0.4, 0.7], now.shape)
        inputs = {
            "target_tokens": plain.loss_inputs["target_tokens"],
            "logprobs": Tensor.of((now + behind).astype(np.float32)),
            "advantages": Tensor.of(rng.normal(0, 1, now.shape).astype(np.float32)),
        }
        data.append(Datum(plain.tokens, inputs))
    return data


def with_inputs(datum: Datum, **inputs: Array) -> Datum:
    """The datum with further loss inputs, float32."""
    tensors = {name: Tensor.of(np.asarray(values, dtype=np.float32)) for name, values in inputs.items()}
    return Datum(datum.tokens, {**datum.loss_inputs, **tensors})


def given(datum: Datum, name: str) -> Array:
    """One loss input as an array."""
    return datum.loss_inputs[name].array()


def request(prompt: Sequence[int], **settings: Any) -> SampleRequest:
    """Six tokens that nothing stops, unless settings say otherwise."""
    defaults = {"num_samples": 1, "seed": 5, "max_tokens": 6, "stop_at_eos": False}
    return SampleRequest(prompt=Tensor.of(np.array(prompt, dtype=np.int32)), **{**defaults, **settings})


# ---------------------------------------------------------------------------- results


def logprobs(result: ForwardResult) -> list[Array]:
    """The log-probs of each datum."""
    return [output["logprobs"].array() for output in result.outputs]


def drawn(result: SampleResult) -> list[list[int]]:
    """The tokens of each sequence."""
    return [sequence.tokens.array().tolist() for sequence in result.sequences]


def sequence_logprobs(sequences: Sequence[SampledSequence]) -> list[Array]:
    """The log-probs of each sequence."""
    return [sequence.logprobs.array() for sequence in sequences]


def prompt_scores(scores: Tensor | None) -> Array:
    """Log-probs of the prompt's tokens after the first."""
    assert scores is not None
    return scores.array()[1:]


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    normal: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


def alternatives(top: TopLogprobs | None) -> list[list[tuple[int, float]]]:
    """(token, log-prob) pairs of each position."""
    assert top is not None
    return [
        list(zip(tokens.tolist(), scores.tolist(), strict=True))
        for tokens, scores in zip(top.tokens.array(), top.logprobs.array(), strict=True)
    ]


def steps_of(events: Sequence[SampleEvent], call_id: int, sequence: int) -> list[SampleStep]:
    """The steps of one sequence in the order in which they came."""
    steps = [event for event in events if isinstance(event, SampleStep)]
    return [step for step in steps if (step.call_id, step.sequence) == (call_id, sequence)]


def weights(storage: Path, folder: str) -> dict[str, Array]:
    """The factors of a stored adapter by PEFT's names."""
    return dict(load_file(storage / folder / ADAPTER_WEIGHTS))


def same(found: Sequence[Array], expected: Sequence[Array]) -> bool:
    """Whether all arrays are equal, bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def distance(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """Relative difference: norm of the difference by norm of what is expected, over all arrays together."""
    ours, theirs = (
        np.concatenate([np.ravel(part).astype(np.float64) for part in side]) for side in (found, expected)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
