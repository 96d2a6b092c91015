"""The engine interface on the fake model."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray

from engines.fake.checkpoints import AdapterVersions, RunSnapshot, read_run, write_run
from engines.fake.losses import FORMULAS
from engines.fake.model import SITES, VOCABULARY, Adapter, base_weights, size
from engines.fake.options import FakeOptions, read_options
from engines.fake.samples import Sample
from engines.fake.tokenizer import TEXT_END_ID, TURN_END_ID, tokenizer_files
from engines.fake.training import VECTORS, Run, forward, forward_backward, optim_step
from engines.interface import (
    Engine,
    EngineConfig,
    EngineInfo,
    RunOperation,
    SampleEnd,
    SampleEvent,
    UserError,
)
from engines.memory import limits
from engines.operations import (
    CreateRun,
    CreateRunResult,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    LoadWeightsResult,
    LoraSpec,
    OptimStep,
    OptimStepResult,
    SampleRequest,
    SaveWeights,
    SaveWeightsResult,
)
from engines.storage import FolderStorage

_CRASHED = 70

Op = TypeVar("Op")
Outcome = TypeVar("Outcome")


class FakeEngine(Engine):
    """A real model, only a tiny one: every operation does what it says, in numpy, within a fraction of a millisecond.

    Runs and samples never share a computation, so that no number depends on what else is going on.
    """

    def __init__(self, config: EngineConfig, options: FakeOptions) -> None:
        self._config = config
        self._options = options
        self._weights = base_weights()
        self._storage = FolderStorage.of(config)
        self._runs: dict[str, Run] = {}
        memory = limits(config, None)
        self._versions = AdapterVersions(self._storage, memory.adapters)
        self._waiting: dict[int, SampleRequest] = {}
        self._samples: dict[int, Sample] = {}
        self._info = _info(config, options, memory.runs)
        self._passes = 0

    @classmethod
    def load(cls, config: EngineConfig) -> FakeEngine:
        return cls(config, read_options(config.options))

    def info(self) -> EngineInfo:
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        return tokenizer_files(self._options.max_context)

    def close(self) -> None:
        self._runs.clear()
        self._waiting.clear()
        self._samples.clear()

    # ------------------------------------------------------------------ training

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        return self._each(self._create_run, items)

    def _create_run(self, run_id: str, operation: CreateRun) -> CreateRunResult:
        if operation.folder is None:
            run = Run(Adapter.initial(operation.lora))
        else:
            run = read_run(self._storage, operation.folder, operation.lora, operation.optimizer_state)
        self._runs[run_id] = run
        return CreateRunResult(parameters=run.adapter.values.size)

    def run_bytes(self, lora: LoraSpec) -> int:
        return VECTORS * np.dtype(np.float32).itemsize * size(lora)

    def drop_run(self, run_id: str) -> None:
        self._runs.pop(run_id, None)

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self._each(self._forward_backward, items)

    def _forward_backward(self, run_id: str, operation: ForwardBackward) -> ForwardResult:
        self._look_at(datum.tokens.array() for datum in operation.data)
        result = forward_backward(self._weights, self._run(run_id), operation)
        result.metrics["loss:sum"] += self._options.drift * self._config.epoch
        return result

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self._each(self._forward, items)

    def _forward(self, run_id: str, operation: Forward) -> ForwardResult:
        self._look_at(datum.tokens.array() for datum in operation.data)
        return forward(self._weights, self._run(run_id), operation)

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        return self._each(self._optim_step, items)

    def _optim_step(self, run_id: str, operation: OptimStep) -> OptimStepResult:
        norm = optim_step(self._run(run_id), operation)
        return OptimStepResult(metrics={"unclipped_grad_l2:mean": norm})

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return self._each(self._save_weights, items)

    def _save_weights(self, run_id: str, operation: SaveWeights) -> SaveWeightsResult:
        run, base_model = self._run(run_id), self._config.base_model
        return SaveWeightsResult(
            write_run(self._storage, operation.folder, base_model, run, operation.optimizer_state)
        )

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        return self._each(self._load_weights, items)

    def _load_weights(self, run_id: str, operation: LoadWeights) -> LoadWeightsResult:
        spec = self._run(run_id).adapter.spec
        self._runs[run_id] = read_run(self._storage, operation.folder, spec, operation.optimizer_state)
        return LoadWeightsResult()

    def snapshot(self, run_id: str) -> RunSnapshot:
        return RunSnapshot(self._config.base_model, self._run(run_id))

    def _run(self, run_id: str) -> Run:
        run = self._runs.get(run_id)
        if run is None:
            raise UserError(f"there is no run {run_id} in this engine; create it first")
        return run

    def _each(
        self, perform: Callable[[str, Op], Outcome], items: Sequence[RunOperation[Op]]
    ) -> list[Outcome | UserError]:
        """Perform the operations of a call one after the other."""
        self._delay()
        return [_attempt(perform, item) for item in items]

    # ------------------------------------------------------------------ sampling

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        # All samples whose adapters are in memory advance in every step, so no party waits for another.
        self._look_at([request.prompt.array()])
        if request.adapter is not None:
            self._versions.require(request.adapter)
        self._waiting[call_id] = request

    def advance(self) -> list[SampleEvent]:
        if self.sampling:
            self._delay()
            self._passes += 1
        events: list[SampleEvent] = self._begin_waiting()
        for sample in list(self._samples.values()):
            events += sample.advance()
            if not sample.live:
                self.cancel_sample(sample.call_id)
        return events

    def _begin_waiting(self) -> list[SampleEvent]:
        """Begin what has its adapter in memory, in order; the ends of those whose adapters cannot be read."""
        ends: list[SampleEvent] = []
        for call_id, request in list(self._waiting.items()):
            try:
                adapter = None if request.adapter is None else self._versions.take(request.adapter)
            except UserError as error:
                ends.append(SampleEnd(call_id, error))
                del self._waiting[call_id]
                continue
            if adapter is None and request.adapter is not None:
                break  # until others give theirs back
            del self._waiting[call_id]
            self._samples[call_id] = Sample(call_id, request, adapter, self._weights, self._info)
        return ends

    def cancel_sample(self, call_id: int) -> None:
        self._waiting.pop(call_id, None)
        sample = self._samples.pop(call_id, None)
        if sample is not None and sample.request.adapter is not None:
            self._versions.memory.give_back(sample.request.adapter.folder)

    @property
    def sampling(self) -> bool:
        return bool(self._samples or self._waiting)

    @property
    def passes(self) -> int:
        return self._passes

    def stats(self) -> dict[str, float]:
        return {
            "resident_runs": len(self._runs),
            "resident_adapters": len(self._versions.memory),
            "adapter_bytes": self._versions.memory.used,
            "adapter_memory_bytes": self._versions.memory.limit,
            "active_samples": len(self._samples) + len(self._waiting),
        }

    # ------------------------------------------------------------------ what the options ask for

    def _delay(self) -> None:
        if self._options.delay_s:
            time.sleep(self._options.delay_s)

    def _look_at(self, texts: Iterable[NDArray[Any]]) -> None:
        """Break, get stuck or die at the tokens that the options name."""
        options = self._options
        for text in texts:
            self._passes += 1
            if options.crash_on_token is not None and options.crash_on_token in text:
                os._exit(_CRASHED)
            if options.hang_on_token is not None and options.hang_on_token in text:
                threading.Event().wait()
            if options.fail_on_token is not None and options.fail_on_token in text:
                raise RuntimeError(
                    f"token {options.fail_on_token} was met, which options.fail_on_token names"
                )


def _attempt(perform: Callable[[str, Op], Outcome], item: RunOperation[Op]) -> Outcome | UserError:
    """The result, or the UserError that kept the operation from being applied."""
    try:
        return perform(item.run_id, item.operation)
    except UserError as error:
        return error


def _info(config: EngineConfig, options: FakeOptions, run_memory: int) -> EngineInfo:
    return EngineInfo(
        base_model=config.base_model,
        architecture="ByteLinearForCausalLM",
        roles=config.roles,
        vocab_size=VOCABULARY,
        max_context=options.max_context,
        losses=tuple(FORMULAS),
        max_rank=options.max_rank,
        eos_tokens=(TURN_END_ID, TEXT_END_ID),
        max_top_logprobs=VOCABULARY,
        device="cpu",
        dtype="float32",
        deterministic=True,
        versions={"numpy": np.__version__, "safetensors": safetensors.__version__},
        layers={site.name: (site.in_features, site.out_features) for site in SITES},
        run_memory_bytes=run_memory,
    )
