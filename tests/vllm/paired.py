"""Training on Transformers and sampling on vLLM, as one engine: what the contract's tests of sampling need."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from engines.hf import HfEngine
from engines.interface import (
    DamagedWeights,
    Engine,
    EngineConfig,
    EngineInfo,
    PendingSnapshot,
    RunOperation,
    SampleEnd,
    SampleEvent,
    SampleStep,
    Token,
    UserError,
)
from engines.messages import Cancel, Failure, FromEngine, Ping, Pong, Ready, Sample, Sampled, SampleDelta
from engines.operations import (
    AdapterRef,
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
    SampleResult,
    SaveWeights,
    SaveWeightsResult,
    decode_result,
    encode,
)
from tests.engines.owner import Owner

CONTEXT = 256
START_S = 300.0
PATIENCE_S = 60.0


class VllmProcess:
    """An engine process on vLLM that several engines of the tests share."""

    def __init__(self, python: str, root: Path, model: str, **options: Any) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.root = root
        self.model = model
        self.owner = Owner(
            root,
            python=python,
            plugin="vllm",
            base_model="test/tiny",
            model=model,
            roles=("sample",),
            owner_timeout_s=600.0,
            options={"dtype": "float32", "max_context": CONTEXT, "adapters": 5, **options},
        )
        self.calls = itertools.count(1)
        self._folders = itertools.count(1)
        self.ready: Ready

    def __enter__(self) -> VllmProcess:
        self.ready = self.owner.load(START_S)
        self.files = dict(zip(self.ready.tokenizer_files, self.owner.payloads, strict=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.owner.__exit__(kind, error, trace)

    def new_folder(self) -> Path:
        return self.root / f"t{next(self._folders)}"


class PairedEngine(Engine):
    """Adapters lie in a folder of the vLLM process's storage."""

    def __init__(self, process: VllmProcess, storage: Path) -> None:
        self._process = process
        self._prefix = storage.name
        self.trainer = HfEngine.load(
            EngineConfig(
                name="trainer",
                plugin="hf",
                base_model="test/tiny",
                model=process.model,
                roles=("train", "sample"),
                storage=str(storage),
                epoch=1,
                options={"device": "cpu", "max_context": CONTEXT},
            )
        )
        self._calls: dict[int, int] = {}
        self._early: list[SampleEvent] = []
        self._stats: dict[str, float] = {}
        self._passes = 0

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        raise NotImplementedError("it is made of two")

    def info(self) -> EngineInfo:
        """What vLLM says, and the trainer's losses and layers."""
        trainer = self.trainer.info()
        return msgspec.structs.replace(
            self._process.ready.info, losses=trainer.losses, layers=trainer.layers, roles=("train", "sample")
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        return self._process.files

    def close(self) -> None:
        self.trainer.close()

    # ------------------------------------------------------------------ training

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        return self.trainer.create_runs(items)

    def run_bytes(self, lora: LoraSpec) -> int:
        return self.trainer.run_bytes(lora)

    def drop_run(self, run_id: str) -> None:
        self.trainer.drop_run(run_id)

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self.trainer.forward_backward(items)

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self.trainer.forward(items)

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        return self.trainer.optim_step(items)

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return self.trainer.save_weights(items)

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        return self.trainer.load_weights(items)

    def snapshot(self, run_id: str) -> PendingSnapshot:
        return self.trainer.snapshot(run_id)

    # ------------------------------------------------------------------ sampling

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        if request.adapter is not None:
            folder = f"{self._prefix}/{request.adapter.folder}"
            request = msgspec.structs.replace(request, adapter=AdapterRef(folder, folder))
        if request.session:
            request = msgspec.structs.replace(request, session=f"{self._prefix}/{request.session}")
        number = next(self._process.calls)
        self._calls[number] = call_id
        self._process.owner.send(Sample(number, stream=True, party=party), encode(request))
        for event in self._until_pong():
            self._early.append(event)
        for event in [
            each for each in self._early if isinstance(each, SampleEnd) and each.call_id == call_id
        ]:
            if isinstance(event.result, UserError):
                self._early.remove(event)
                raise event.result

    def advance(self) -> list[SampleEvent]:
        events, self._early = self._early, []
        if not events and self.sampling:
            events += self._heard(self._process.owner.next(PATIENCE_S))
        for message, payloads in self._process.owner.all_there():
            self._process.owner.payloads = payloads
            events += self._heard(message)
        self._passes += 1
        return events

    def cancel_sample(self, call_id: int) -> None:
        for number in [number for number, own in self._calls.items() if own == call_id]:
            del self._calls[number]
            self._process.owner.send(Cancel(number))
        self._early = [event for event in self._early if event.call_id != call_id]

    @property
    def sampling(self) -> bool:
        return bool(self._calls or self._early)

    @property
    def passes(self) -> int:
        return self._passes

    def stats(self) -> dict[str, float]:
        self._early += self._until_pong()
        return self._stats

    # ------------------------------------------------------------------ messages

    def _until_pong(self) -> list[SampleEvent]:
        events: list[SampleEvent] = []
        self._process.owner.send(Ping())
        deadline = time.monotonic() + PATIENCE_S
        while True:
            message = self._process.owner.next(deadline - time.monotonic())
            if isinstance(message, Pong):
                self._stats = message.stats
                return events
            events += self._heard(message)

    def _heard(self, message: FromEngine) -> list[SampleEvent]:
        if not isinstance(message, (SampleDelta, Sampled)) or message.call_id not in self._calls:
            return []
        call_id = self._calls[message.call_id]
        if isinstance(message, SampleDelta):
            return list(_steps(message, call_id))
        del self._calls[message.call_id]
        if message.failure is not None:
            return [SampleEnd(call_id, _error(message.failure, self._process.root))]
        result = decode_result(self._process.owner.payloads[0])
        assert isinstance(result, SampleResult)
        return [SampleEnd(call_id, result)]


def _error(failure: Failure, storage: Path) -> Exception:
    """What was raised in the process, as far as its message tells."""
    if failure.category == "user":
        return UserError(failure.message)
    if "the stored weights are" in failure.message:
        return DamagedWeights(failure.message, storage)
    return RuntimeError(failure.message)


def _steps(delta: SampleDelta, call_id: int) -> Sequence[SampleStep]:
    tops = delta.top_logprobs or [[] for _ in delta.tokens]
    tokens = [
        Token(token, logprob, tuple((token, score) for token, score in top))
        for token, logprob, top in zip(delta.tokens, delta.logprobs, tops, strict=True)
    ]
    return [
        SampleStep(call_id, delta.sequence, token, delta.stop_reason if i == len(tokens) - 1 else None)
        for i, token in enumerate(tokens)
    ]
