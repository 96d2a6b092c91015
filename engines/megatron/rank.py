"""What every rank does, rank 0 too: holds its part of the model and of the runs, and performs calls.

`python -m engines.megatron.rank` is a rank other than 0; `engines.ranks.leading` starts it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.environment import DETERMINISTIC_PRODUCTS, set_defaults
from engines.interface import EngineConfig, LoadError, UserError
from engines.megatron.calls import (
    Call,
    CreateRuns,
    DropRun,
    Evaluate,
    GatherRun,
    Loaded,
    LoadRuns,
    StepRuns,
    Stored,
    Train,
    decode_call,
    decode_load,
    decode_loaded,
    decode_stored,
    encode,
)
from engines.megatron.groups import make_groups
from engines.megatron.megatron_core import model_parallel_cuda_manual_seed, parallel_state
from engines.megatron.model import Stage
from engines.megatron.options import MegatronOptions, dtype_name, read_options
from engines.megatron.places import Place
from engines.megatron.shapes import read_shape
from engines.megatron.training import Trainer
from engines.megatron.without_cuda import WithoutCuda
from engines.operations import CreateRunResult, LoraSpec
from engines.ranks.following import Perform, follow
from engines.ranks.world import World
from engines.storage import FolderStorage
from engines.tuning.checkpoints import read_run
from engines.tuning.lora import Adapter, Gradient, Site, size
from engines.tuning.optimizer import AdamW
from engines.tuning.runs import Run

log = logging.getLogger("engines.megatron")

_CPU = torch.device("cpu")


class Rank:
    """One rank's part of the engine. Every rank is called with the same calls, in the same order."""

    def __init__(
        self, config: EngineConfig, options: MegatronOptions, world: World, device: torch.device
    ) -> None:
        torch.set_num_threads(options.threads)
        torch.set_float32_matmul_precision("highest")
        # Flash attention goes back deterministically only where other kernels are an error.
        torch.use_deterministic_algorithms(options.deterministic, warn_only=device.type != "cuda")
        if options.deterministic:
            set_defaults(DETERMINISTIC_PRODUCTS)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # megatron-core makes its tensors on the current one
        self.config = config
        self.world = world
        self.device = device
        with ExitStack() as undo:
            without_cuda = undo.enter_context(WithoutCuda()) if device.type == "cpu" else None
            undo.callback(parallel_state.destroy_model_parallel)
            self._join(options)
            folder = Path(config.model)
            place = Place.of(options.layout, world.rank)
            dtype = dtype_of(options, device)
            groups = make_groups(options.layout, world.rank, options.rank_timeout_s)
            self.stage = Stage(
                read_shape(folder),
                place,
                device,
                dtype,
                experts=groups.expert,
                recompute=bool(options.recompute),
            )
            self.stage.load(folder)
            self._undo = undo.pop_all()
        self.sharding = self.stage.sharding
        self.trainer = Trainer(
            self.stage,
            world,
            without_cuda,
            groups,
            options.pass_tokens,
            together=not options.deterministic,
        )
        self.runs: dict[str, Run] = {}

    def perform(self, call: Call) -> Any:
        """One result for each item of the call; a whole run for `GatherRun`. Complete on rank 0 only."""
        match call:
            case CreateRuns():
                return [
                    self._begin(run_id, item.lora, item.folder, item.optimizer_state)
                    for run_id, item in call.items
                ]
            case LoadRuns():
                return [
                    self._begin(run_id, self._spec(run_id), item.folder, item.optimizer_state)
                    for run_id, item in call.items
                ]
            case DropRun():
                self.runs.pop(call.run_id, None)
                return None
            case Evaluate():
                return self.trainer.forward(self._with_runs(call.items))
            case Train():
                return self.trainer.forward_backward(self._with_runs(call.items))
            case StepRuns():
                return self.trainer.optim_step(self._with_runs(call.items))
            case GatherRun():
                return self._gather(self.runs[call.run_id])

    def close(self) -> None:
        """Leave megatron-core as it was found."""
        self.runs.clear()
        self._undo.close()

    def _join(self, options: MegatronOptions) -> None:
        """Have megatron-core make its groups of ranks."""
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=options.layout.tensor,
            pipeline_model_parallel_size=options.layout.pipeline,
            distributed_timeout_minutes=options.rank_timeout_s / 60,
        )
        model_parallel_cuda_manual_seed(0)  # nothing is drawn; megatron-core asks for the state

    def _with_runs(self, items: Sequence[tuple[str, Any]]) -> list[tuple[Run, Any]]:
        return [(self.runs[run_id], operation) for run_id, operation in items]

    def _spec(self, run_id: str) -> LoraSpec:
        return self.runs[run_id].adapter.spec

    # ------------------------------------------------------------------ whole runs and parts of them

    def _begin(
        self, run_id: str, spec: LoraSpec, folder: str | None, optimizer_state: bool
    ) -> CreateRunResult | UserError:
        """A run with fresh weights, or with those of a folder, which rank 0 reads for all."""
        if folder is None:
            self.runs[run_id] = Run(self.sharding.initial(spec, self.device), AdamW())
            return CreateRunResult(parameters=size(self.sharding.whole, spec))
        refusal: UserError | None = None
        said = b""
        if self.world.leads:
            try:
                whole = read_run(
                    FolderStorage.of(self.config), folder, self.sharding.whole, _CPU, spec, optimizer_state
                )
                said = encode(_stored(whole))
            except UserError as error:
                refusal = error
        said = self.world.tell(said)
        if said:
            stored = decode_stored(said)
            own = [self.sharding.share_of(_vector(vector), spec, self.device) for vector in stored.vectors]
            run = _run_of(stored, self.sharding.sites, spec, own)
            owner = self.trainer.ownership(run.adapter)
            run.optimizer = _changed(run.optimizer, lambda moment: owner.take(moment).clone())
            self.runs[run_id] = run
        return refusal or CreateRunResult(parameters=size(self.sharding.whole, spec))

    def _gather(self, run: Run) -> Run | None:
        """A copy of the whole run in main memory, on rank 0."""
        place, count = self.stage.place, run.adapter.values.numel()
        owner = self.trainer.ownership(run.adapter)
        optimizer = _changed(run.optimizer, lambda moment: owner.whole(moment, count))
        run = Run(run.adapter, optimizer, run.pending)
        mine = encode(_stored(run) if place.is_original or place.has_original_experts else Stored(0, []))
        heard = [decode_stored(said) for said in self.world.collect(mine)]
        if not heard:
            return None
        spec = run.adapter.spec
        whole = [torch.zeros(size(self.sharding.whole, spec), dtype=torch.float32) for _ in heard[0].vectors]
        for rank, said in enumerate(heard):
            sharding = self.sharding.of(Place.of(self.stage.place.layout, rank))
            for vector, target in zip(said.vectors, whole, strict=False):  # copies of the model say nothing
                sharding.put(_vector(vector), target, spec)
        return _run_of(heard[0], self.sharding.whole, spec, whole)


def load_rank(config: EngineConfig, world: World, device: torch.device) -> Rank:
    """This rank's part. Raises LoadError, on every rank, when one of them cannot load its own."""
    rank, refusal = None, ""
    try:
        rank = Rank(config, read_options(config.options), world, device)
    except LoadError as error:
        refusal = str(error)
    world.meet()
    refusals = [decode_loaded(said).refusal for said in world.exchange(encode(Loaded(refusal)))]
    found = next((said for said in refusals if said), None)
    if found is not None:
        raise LoadError(found)
    assert rank is not None
    return rank


def dtype_of(options: MegatronOptions, device: torch.device) -> torch.dtype:
    """Of the frozen weights."""
    return torch.bfloat16 if dtype_name(options, device.type) == "bfloat16" else torch.float32


def _changed(optimizer: AdamW, change: Callable[[Tensor], Tensor]) -> AdamW:
    """The same with other moments, if there are any."""
    moments = (optimizer.exp_avg, optimizer.exp_avg_sq)
    return AdamW(optimizer.steps, *(change(moment) for moment in moments if moment is not None))


def _stored(run: Run) -> Stored:
    moments = [each for each in (run.optimizer.exp_avg, run.optimizer.exp_avg_sq) if each is not None]
    pending = [] if run.pending is None else [run.pending.values]
    vectors = [_bytes(vector) for vector in (run.adapter.values, *pending, *moments)]
    return Stored(run.optimizer.steps, vectors, bool(pending))


def _run_of(stored: Stored, sites: Sequence[Site], spec: LoraSpec, vectors: Sequence[Tensor]) -> Run:
    """A run of the sites, of vectors in the order that `Stored` has."""
    values, *others = vectors
    run = Run(Adapter(sites, spec, values), AdamW(stored.steps, *others[stored.pending :]))
    if stored.pending:
        run.pending = Gradient(run.adapter)
        run.pending.values.copy_(others[0])
    return run


def _bytes(vector: Tensor) -> bytes:
    return vector.detach().cpu().numpy().tobytes()


def _vector(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.float32))


def join(world: World, said: bytes) -> Perform:
    """A rank other than 0: load what rank 0 says."""
    load = decode_load(said)
    rank = load_rank(load.config, world, world.device)

    def perform(call: bytes) -> None:
        rank.perform(decode_call(call))

    return perform


if __name__ == "__main__":
    sys.exit(follow(join))
