"""The engine interface on Megatron-Core: rank 0's side of each verb. The work is done by all ranks (`rank.py`)."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from engines.interface import EngineConfig, EngineInfo, LoadError, RunOperation, UserError
from engines.losses import CUSTOM
from engines.losses.formulas import FORMULAS
from engines.megatron.calls import (
    Call,
    CreateRuns,
    DropRun,
    Evaluate,
    GatherRun,
    Load,
    LoadRuns,
    StepRuns,
    Train,
    encode,
)
from engines.megatron.folders import eos_tokens, folder_of
from engines.megatron.megatron_core import SUPPORTED, VERSION
from engines.megatron.moments import owned
from engines.megatron.options import MegatronOptions, read_options
from engines.megatron.places import Place
from engines.megatron.planning import plan
from engines.megatron.rank import Rank, dtype_of, join, load_rank
from engines.megatron.shapes import ModelShape, read_shape
from engines.megatron.sharding import Sharding, model_sites
from engines.memory import free_host_bytes, limits
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
from engines.ranks.leading import Leader
from engines.tokenizer_files import read_tokenizer_files
from engines.training_only import TrainingEngine
from engines.tuning.checkpoints import RunSnapshot, write_run
from engines.tuning.lora import size
from engines.tuning.runs import Run

log = logging.getLogger("engines.megatron")

T = TypeVar("T")


class MegatronEngine(TrainingEngine):
    """Runs are on the ranks. What is kept here of each is its configuration and whether gradients are pending."""

    def __init__(
        self,
        config: EngineConfig,
        options: MegatronOptions,
        shape: ModelShape,
        files: dict[str, bytes],
        devices: list[torch.device],
    ) -> None:
        """`options` have every part of the layout; `devices` are the ranks'."""
        self.config = config
        self.options = options
        self.files = files
        layout = options.layout
        self.shardings = [Sharding(shape, Place.of(layout, rank)) for rank in range(layout.ranks)]
        self.leader = Leader(
            "engines.megatron.rank",
            layout.ranks,
            options.rank_timeout_s,
            devices,
            options.start_timeout_s,
            config.meeting,
        )
        try:
            self.rank = self._load(devices[0])
        except BaseException:
            self.leader.abandon()
            raise
        memory = limits(config, _free_bytes(devices[0], layout.ranks))
        self._info = _describe(config, options, shape, devices[0], memory.runs)

    @classmethod
    def follower(cls) -> Callable[[Any, bytes], Callable[[bytes], None]]:
        return join

    @classmethod
    def load(cls, config: EngineConfig) -> MegatronEngine:
        options = read_options(config.options)
        if "sample" in config.roles:
            raise LoadError(
                'the megatron engine trains and does not sample: set roles = ["train"], and let an engine of the same '
                "base_model with the plugin hf or vllm sample"
            )
        if VERSION not in SUPPORTED:
            raise LoadError(
                f"megatron-core is {VERSION}; this engine needs {' or '.join(SUPPORTED)}: pip install "
                f"megatron-core=={SUPPORTED[sys.version_info >= (3, 12)]}"
            )
        files = read_tokenizer_files(config.model)
        config = msgspec.structs.replace(config, model=str(folder_of(config.model)))
        shape = read_shape(Path(config.model))
        if options.max_context is not None and options.max_context > shape.max_context:
            raise LoadError(
                f"options.max_context is {options.max_context}, but the model has {shape.max_context} positions"
            )
        planned = plan(options, shape, config.meeting)
        log.info("layout: %s", planned.reason)
        config = msgspec.structs.replace(config, options={**config.options, **planned.parts})
        return cls(config, planned.decided(options), shape, files, planned.devices)

    def _load(self, device: torch.device) -> Rank:
        call = encode(Load(self.config, device.type))
        return self.leader.call(call, lambda: load_rank(self.config, self.leader.world, device), LoadError)

    def info(self) -> EngineInfo:
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.files

    def close(self) -> None:
        self.rank.close()
        self.leader.close()

    def _call(self, call: Call) -> Any:
        """Have all ranks perform a call; gives what rank 0 has of it."""
        return self.leader.call(encode(call), lambda: self.rank.perform(call))

    # ------------------------------------------------------------------ runs

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        found: list[CreateRunResult | UserError] = self._call(
            CreateRuns([(run_id, operation) for run_id, operation in items])
        )
        return found

    def run_bytes(self, lora: LoraSpec) -> int:
        """On the rank that holds the most of it."""
        most = max(size(sharding.sites, lora) + owned(sharding, lora) for sharding in self.shardings)
        return (
            2 * torch.float32.itemsize * most
        )  # values and their gradients; both moments of those that it owns

    def drop_run(self, run_id: str) -> None:
        if run_id in self.rank.runs:
            self._call(DropRun(run_id))

    # ------------------------------------------------------------------ training

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self._with_known(Train, items)

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self._with_known(Evaluate, items)

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        norms: list[float | UserError] = self._with_known(StepRuns, items)
        return [
            norm if isinstance(norm, UserError) else OptimStepResult({"unclipped_grad_l2:mean": norm})
            for norm in norms
        ]

    def _with_known(self, call: Callable[[Any], Call], items: Sequence[RunOperation[Any]]) -> list[Any]:
        """The results of a call for those runs that there are."""
        known = [tuple(item) for item in items if item.run_id in self.rank.runs]
        results = iter(self._call(call(known)) if known else ())
        return [next(results) if item.run_id in self.rank.runs else _unknown(item.run_id) for item in items]

    # ------------------------------------------------------------------ checkpoints

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return [self._save(item) for item in items]

    def _save(self, item: RunOperation[SaveWeights]) -> SaveWeightsResult | UserError:
        """Files are written when the ranks are done: a storage that refuses is no fault of theirs."""
        if item.run_id not in self.rank.runs:
            return _unknown(item.run_id)
        run: Run = self._call(GatherRun(item.run_id))
        operation = item.operation
        return SaveWeightsResult(write_run(self.config, operation.folder, run, operation.optimizer_state))

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        found = self._with_known(LoadRuns, items)
        return [result if isinstance(result, UserError) else LoadWeightsResult() for result in found]

    def snapshot(self, run_id: str) -> RunSnapshot:
        if run_id not in self.rank.runs:
            raise _unknown(run_id)
        return RunSnapshot(self.config.base_model, self._call(GatherRun(run_id)))

    # ------------------------------------------------------------------ state

    @property
    def passes(self) -> int:
        return self.rank.stage.passes

    def stats(self) -> dict[str, float]:
        """Raises EngineBroken when a rank is gone: the host asks now and then, also when nothing is to be done."""
        self.leader.check()
        return {
            "resident_runs": len(self.rank.runs),
            "resident_adapters": 0,
            "active_samples": 0,
            "ranks": self.leader.world.size,
        }


def _describe(
    config: EngineConfig, options: MegatronOptions, shape: ModelShape, device: torch.device, run_memory: int
) -> EngineInfo:
    return EngineInfo(
        base_model=config.base_model,
        architecture=shape.family,
        roles=config.roles,
        vocab_size=shape.vocabulary,
        max_context=options.max_context or shape.max_context,
        losses=(*FORMULAS, CUSTOM),
        max_rank=options.max_rank,
        eos_tokens=eos_tokens(Path(config.model)),
        max_top_logprobs=0,
        device=f"{options.layout.ranks} x {device.type}",
        dtype=str(dtype_of(options, device)).removeprefix("torch."),
        deterministic=options.deterministic,
        versions={
            "torch": str(torch.__version__),
            "megatron-core": VERSION,
            "python": platform.python_version(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": str(options.threads),
            "layout": f"{options.layout}{', recompute' if options.recompute else ''}",
        },
        layers={each.site.name: each.site[1:] for each in model_sites(shape)},
        run_memory_bytes=run_memory,
        pass_tokens=options.pass_tokens * options.layout.data,
    )


def _free_bytes(device: torch.device, ranks: int) -> int | None:
    """Of a rank: its device's, or its share of main memory."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    host = free_host_bytes()
    return None if host is None else host // ranks


def _unknown(run_id: str) -> UserError:
    return UserError(f"there is no run {run_id} in this engine; create it first")
