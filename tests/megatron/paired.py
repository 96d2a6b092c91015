"""Training on Megatron and sampling on Transformers, as one engine: what the contract's tests are run with.

The ranks are started once for many tests. Each test has a storage folder of its own, and each engine that it asks for
has its own run ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engines.hf import HfEngine
from engines.interface import (
    Engine,
    EngineConfig,
    EngineInfo,
    PendingSnapshot,
    RunOperation,
    SampleEvent,
    UserError,
)
from engines.megatron import MegatronEngine
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
from tests.megatron.conftest import configuration

Op = TypeVar("Op")

_numbers = itertools.count(1)


class PairedEngine(Engine):
    """`storage` is a folder of the Megatron engine's storage."""

    def __init__(self, trainer: MegatronEngine, model: str, storage: Path) -> None:
        self._trainer = trainer
        self._prefix = storage.name
        self._number = next(_numbers)
        self._sampler = HfEngine.load(configuration("hf", model, storage))
        self._runs: set[str] = set()

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        raise NotImplementedError("it is made of two")

    def info(self) -> EngineInfo:
        """The trainer's, and how many alternatives the sampler tells."""
        most = self._sampler.info().max_top_logprobs
        return msgspec.structs.replace(self._trainer.info(), roles=("train", "sample"), max_top_logprobs=most)

    def tokenizer_files(self) -> dict[str, bytes]:
        return self._trainer.tokenizer_files()

    def close(self) -> None:
        """The ranks go on for other tests."""
        for run_id in self._runs:
            self._trainer.drop_run(run_id)
        self._sampler.close()

    # ------------------------------------------------------------------ training

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        self._runs |= {self._run(item.run_id) for item in items}
        return self._trainer.create_runs(self._own(items))

    def run_bytes(self, lora: LoraSpec) -> int:
        return self._trainer.run_bytes(lora)

    def drop_run(self, run_id: str) -> None:
        self._trainer.drop_run(self._run(run_id))

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self._trainer.forward_backward(self._own(items))

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self._trainer.forward(self._own(items))

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        return self._trainer.optim_step(self._own(items))

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return self._trainer.save_weights(self._own(items))

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        return self._trainer.load_weights(self._own(items))

    def snapshot(self, run_id: str) -> PendingSnapshot:
        return self._trainer.snapshot(self._run(run_id))

    def _run(self, run_id: str) -> str:
        return f"{self._number}/{run_id}"

    def _own(self, items: Sequence[RunOperation[Any]]) -> list[RunOperation[Any]]:
        return [RunOperation(self._run(run_id), self._moved(operation)) for run_id, operation in items]

    def _moved(self, operation: Op) -> Op:
        folder = getattr(operation, "folder", None)
        if folder is None:
            return operation
        moved: Op = msgspec.structs.replace(operation, folder=f"{self._prefix}/{folder}")  # type: ignore[type-var]
        return moved

    # ------------------------------------------------------------------ sampling

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        self._sampler.start_sample(call_id, request, party)

    def advance(self) -> list[SampleEvent]:
        return self._sampler.advance()

    def cancel_sample(self, call_id: int) -> None:
        self._sampler.cancel_sample(call_id)

    @property
    def sampling(self) -> bool:
        return self._sampler.sampling

    @property
    def passes(self) -> int:
        return self._trainer.passes

    def stats(self) -> dict[str, float]:
        return self._sampler.stats() | self._trainer.stats()
