"""The half of the engine interface that an engine without the role `train` has no use for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.interface import Engine, PendingSnapshot, RunOperation, UserError
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
    SaveWeights,
    SaveWeightsResult,
)


class SamplingEngine(Engine):
    """An engine that trains nothing. The gateway sends it no run; whoever does is refused."""

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        return self._refuse(items)

    def run_bytes(self, lora: LoraSpec) -> int:
        raise self._refusal()

    def drop_run(self, run_id: str) -> None:
        """There are none, and an unknown one is no error."""

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self._refuse(items)

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self._refuse(items)

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        return self._refuse(items)

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return self._refuse(items)

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        return self._refuse(items)

    def snapshot(self, run_id: str) -> PendingSnapshot:
        raise self._refusal()

    def _refuse(self, items: Sequence[RunOperation[Any]]) -> list[Any]:
        return [self._refusal() for _ in items]

    def _refusal(self) -> UserError:
        return UserError(f"the engine of {self.info().base_model} samples and does not train")
