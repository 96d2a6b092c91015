"""The engine interface on Transformers: each verb in a few lines, the work in the modules beside this one."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer

from engines.hf.adapter_versions import AdapterVersions
from engines.hf.budget import token_budget
from engines.hf.decoding import Decoder
from engines.hf.model import BaseModel, free_bytes, load_base_model, versions
from engines.hf.options import HfOptions, read_options
from engines.hf.samples import new_sample
from engines.hf.training import forward, forward_backward
from engines.interface import (
    Engine,
    EngineConfig,
    EngineInfo,
    OutOfMemory,
    RunOperation,
    SampleEvent,
    UserError,
)
from engines.losses import CUSTOM
from engines.losses.formulas import FORMULAS
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
from engines.tokenizer_files import read_tokenizer_files
from engines.tuning.checkpoints import RunSnapshot, read_run, write_run
from engines.tuning.lora import Adapter, size
from engines.tuning.optimizer import AdamW
from engines.tuning.runs import VECTORS, Run, optim_step
from engines.tuning.torch_errors import translated

log = logging.getLogger("engines.hf")

MAX_TOP_LOGPROBS = 256
_TOO_MUCH_DATA = (
    "a pass over so much data; send fewer or shorter data in a call (one datum is never split), or have the operator "
    "lower the option pass_tokens. The operation had no effect"
)

Op = TypeVar("Op")
Result = TypeVar("Result")


class HfEngine(Engine):
    """Runs are `training.Run` objects; sampled adapter versions are immutable copies, kept by their folder."""

    def __init__(
        self, config: EngineConfig, options: HfOptions, base: BaseModel, files: dict[str, bytes]
    ) -> None:
        self.config = config
        self.options = options
        self.base = base
        self.files = files
        self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        free = free_bytes(base.device)
        self.budget = token_budget(base, free, options.pass_tokens, deterministic=options.deterministic)
        memory = limits(config, free)
        self._info = _describe(config, options, base, memory.runs, self.budget.full)
        self.runs: dict[str, Run] = {}
        self.adapters = AdapterVersions(FolderStorage.of(config), base, memory.adapters)
        self.decoder = Decoder(
            base,
            self.adapters,
            options.sample_slots,
            options.prefill_tokens,
            options.deterministic,
            options.prompt_cache_mib << 20,
        )
        self.decoder.graphs.possible &= options.cuda_graphs

    @classmethod
    def load(cls, config: EngineConfig) -> HfEngine:
        options = read_options(config.options)
        files = read_tokenizer_files(config.model)
        return cls(config, options, load_base_model(config, options), files)

    def info(self) -> EngineInfo:
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.files

    def close(self) -> None:
        self.runs.clear()
        self.adapters.memory.clear()
        self.decoder = Decoder(self.base, self.adapters, 1, 1, False)
        self.base.threads.close()

    # ------------------------------------------------------------------ training

    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        return [self._with_room(self._create_run, item) for item in items]

    def _create_run(self, item: RunOperation[CreateRun]) -> CreateRunResult:
        operation = item.operation
        if operation.folder is None:
            run = Run(Adapter.initial(self.base.sites, operation.lora, self.base.device), AdamW())
        else:
            run = self._read_run(operation.folder, operation.lora, operation.optimizer_state)
        self.runs[item.run_id] = run
        return CreateRunResult(parameters=run.adapter.values.numel())

    def run_bytes(self, lora: LoraSpec) -> int:
        return VECTORS * torch.float32.itemsize * size(self.base.sites, lora)

    def drop_run(self, run_id: str) -> None:
        self.runs.pop(run_id, None)

    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        return self._in_passes(forward_backward, items)

    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        return self._in_passes(forward, items)

    def _with_room(
        self, perform: Callable[[RunOperation[Op]], Result], item: RunOperation[Op]
    ) -> Result | UserError:
        """What has no effect before its end is tried once more, with all the memory that can be made free."""
        for _ in range(2):
            try:
                return _attempt(perform, item)
            except MemoryError as error:
                self._make_room(error)
        return OutOfMemory(f"{self.base.device} has no memory left for another run", passing=True)

    def _in_passes(
        self, perform: Callable[..., list[ForwardResult | UserError]], items: Sequence[RunOperation[Any]]
    ) -> list[ForwardResult | UserError]:
        """Operations of all runs together, or in passes of their own when the engine is deterministic."""
        known = [(self.runs[item.run_id], item.operation) for item in items if item.run_id in self.runs]
        together = not self.options.deterministic
        make = partial(perform, self.base, together=together)
        results = iter(self._in_passes_that_fit(make, known) if known else ())
        return [next(results) if item.run_id in self.runs else _unknown(item.run_id) for item in items]

    def _in_passes_that_fit(
        self, make: Callable[..., list[ForwardResult | UserError]], known: list[tuple[Run, Any]]
    ) -> list[ForwardResult | UserError]:
        """When memory runs out, nothing has had an effect: all is tried again in smaller passes, with all the memory
        that can be made free; in the end each operation alone."""
        lengths = [datum.tokens.shape[0] for _, operation in known for datum in operation.data]
        smaller = True
        while smaller:
            try:
                with translated():
                    outcomes = make(known, self.budget.tokens)
            except MemoryError as error:
                self._make_room(error)
                smaller = self.budget.shrink(sum(lengths), max(lengths))
            else:
                self.budget.went_well()
                return outcomes
        return [self._alone(make, one) for one in known]

    def _alone(
        self, make: Callable[..., list[ForwardResult | UserError]], one: tuple[Run, Any]
    ) -> ForwardResult | UserError:
        """An operation whose passes lack memory is tried once more with what it keeps computed again."""
        wanted = self.base.checkpointed
        for checkpointed in sorted({wanted, True}):
            self.base.checkpointed = checkpointed
            try:
                with translated():
                    return make([one], self.budget.tokens)[0]
            except MemoryError as error:
                log.warning("an operation is too large: %s", error)
                self._make_room(error)
            finally:
                self.base.checkpointed = wanted
        return OutOfMemory(f"{self.base.device} has no memory left for {_TOO_MUCH_DATA}")

    def _make_room(self, error: MemoryError) -> None:
        """Let go of everything that can be computed or read again, and of what the error's frames still hold."""
        log.warning("out of memory, whatever can be computed again is let go: %s", error)
        for each in (error, error.__cause__):
            traceback.clear_frames(each.__traceback__ if each is not None else None)
        self.decoder.forget_prompts()
        self.adapters.memory.drop_unused()
        self.base.routing.forget()
        self.decoder.forget_graphs()
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        self.base.threads.share_all()
        known = [(self.runs[item.run_id], item.operation) for item in items if item.run_id in self.runs]
        with translated():
            norms = iter(optim_step(known))
        return [
            _stepped(next(norms)) if item.run_id in self.runs else _unknown(item.run_id) for item in items
        ]

    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        return [_attempt(self._save_weights, item) for item in items]

    def _save_weights(self, item: RunOperation[SaveWeights]) -> SaveWeightsResult:
        run, operation = self._run(item.run_id), item.operation
        size = write_run(self.config, operation.folder, run, operation.optimizer_state)
        if not operation.optimizer_state:
            self.adapters.put(operation.folder, run.adapter)
        return SaveWeightsResult(size_bytes=size)

    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        return [self._with_room(self._load_weights, item) for item in items]

    def _load_weights(self, item: RunOperation[LoadWeights]) -> LoadWeightsResult:
        operation = item.operation
        spec = self._run(item.run_id).adapter.spec
        self.runs[item.run_id] = self._read_run(operation.folder, spec, operation.optimizer_state)
        return LoadWeightsResult()

    def _read_run(self, folder: str, spec: LoraSpec, optimizer_state: bool) -> Run:
        base = self.base
        return read_run(FolderStorage.of(self.config), folder, base.sites, base.device, spec, optimizer_state)

    def snapshot(self, run_id: str) -> RunSnapshot:
        run = self._run(run_id)
        with translated():
            return RunSnapshot(self.config.base_model, run)

    def _run(self, run_id: str) -> Run:
        run = self.runs.get(run_id)
        if run is None:
            raise _unknown(run_id)
        return run

    # ------------------------------------------------------------------ sampling

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        if request.adapter is not None:
            self.adapters.require(request.adapter.folder)
        self.decoder.add(new_sample(call_id, request, self.info(), self.decode, party))

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, special ones included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def advance(self) -> list[SampleEvent]:
        try:
            with translated():
                return self.decoder.advance()
        except MemoryError as error:
            self._make_room(error)
        return self.decoder.shed()

    def cancel_sample(self, call_id: int) -> None:
        self.decoder.cancel(call_id)

    @property
    def sampling(self) -> bool:
        return self.decoder.active > 0

    @property
    def passes(self) -> int:
        return self.base.passes

    def stats(self) -> dict[str, float]:
        return {
            "resident_runs": len(self.runs),
            "resident_adapters": len(self.adapters.memory),
            "adapter_bytes": self.adapters.memory.used,
            "adapter_memory_bytes": self.adapters.memory.limit,
            "active_samples": self.decoder.active,
            "remembered_prompt_tokens": self.decoder.prefill.prompts.tokens,
        }


def _describe(
    config: EngineConfig, options: HfOptions, base: BaseModel, run_memory: int, pass_tokens: int
) -> EngineInfo:
    vocabulary = base.unembedding.vocabulary
    return EngineInfo(
        base_model=config.base_model,
        architecture=type(base.module).__name__,
        roles=config.roles,
        vocab_size=vocabulary,
        max_context=base.max_context,
        losses=(*FORMULAS, CUSTOM),
        max_rank=options.max_rank,
        eos_tokens=base.eos_tokens,
        max_top_logprobs=min(MAX_TOP_LOGPROBS, vocabulary),
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        deterministic=options.deterministic,
        versions=versions(options, base.device),
        layers={site.name: (site.in_features, site.out_features) for site in base.sites},
        run_memory_bytes=run_memory,
        pass_tokens=pass_tokens,
    )


def _stepped(norm: float | UserError) -> OptimStepResult | UserError:
    return norm if isinstance(norm, UserError) else OptimStepResult({"unclipped_grad_l2:mean": norm})


def _unknown(run_id: str) -> UserError:
    return UserError(f"there is no run {run_id} in this engine; create it first")


def _attempt(perform: Callable[[RunOperation[Op]], Result], item: RunOperation[Op]) -> Result | UserError:
    """The result, or the UserError that kept the operation from being applied. Raises MemoryError for every lack of
    memory."""
    try:
        with translated():
            return perform(item)
    except UserError as error:
        return error
