"""What a plugin implements: one class, `Engine`, that trains and/or samples adapters on one base model.

The host (`engines.host`) owns the process, the socket and the order of calls; a plugin only computes. It is called
from one thread. Training calls take a list of operations of different runs, never two of one run, so that an engine
can put many tenants into one pass, and return one entry for each: its result, or the `UserError` that kept it from
being applied. An operation that fails has no effect. Any other exception of a call that changes runs means that
they are in doubt: the host drops them and the gateway restores them from their log. `forward` and `save_weights`
change none: whatever they raise, the runs stay. A save that storage refuses raises its OSError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

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
    SampleResult,
    SaveWeights,
    SaveWeightsResult,
)

Role = Literal["train", "sample"]


class UserError(Exception):
    """The input cannot be honoured; the message names the field, what came and what is allowed."""


class EngineBroken(BaseException):
    """Nothing can be computed in this process any more, on a device that reports an error at every call say. The host
    ends the process, which is replaced. Like KeyboardInterrupt it is no Exception: nothing on the way may catch it."""


class OutOfMemory(UserError):
    """No memory was left for it; it had no effect, and nothing else is touched. `passing`: it may succeed when others
    have finished; else it needs more than the device has."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class DamagedWeights(UserError):
    """Stored weights are missing, cannot be read, or are not what was written: the server's fault, not the sender's.

    The message is for clients and names the file; `path` is where it should be, for the log.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class WeightsOutOfReach(UserError):
    """The storage of weights does not answer: the server's fault, which says nothing about the weights.

    The message is for clients; `path` is where they would be, for the log.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class LoadError(Exception):
    """The base model or the plugin cannot be loaded; the message says what to change."""


class Meeting(msgspec.Struct, frozen=True):
    """Where the ranks of an engine meet that were started by others, on several machines.

    `address` is `host:port`; rank 0 has inherited the `descriptor` of a socket that is bound to it. `ranks` is how many
    there are, rank 0 too.
    """

    address: str
    ranks: int
    descriptor: int


class EngineConfig(msgspec.Struct, frozen=True):
    """What an engine process is started with.

    `model` is a local folder or a hub name; `base_model` the name it is served under; `storage` the folder that
    storage keys are relative to, or with a `storage_url` that of copies of what is stored there; `options` belong to
    the plugin, which refuses unknown ones with LoadError.
    `run_memory_bytes` and `adapter_memory_bytes` are limits that somebody has set; `engines.memory.limits` has others.
    `sampling_share` is the part of the time, between 0 and 1, in which an engine samples while it has training to do
    too. `meeting` is there when other processes wait to be this engine's ranks (`Engine.follower`).
    """

    name: str
    plugin: str
    base_model: str
    model: str
    roles: tuple[Role, ...]
    storage: str
    epoch: int
    options: dict[str, Any] = {}
    owner_timeout_s: float = 30.0
    run_memory_bytes: int | None = None
    adapter_memory_bytes: int | None = None
    sampling_share: float = 0.5
    storage_url: str = ""
    meeting: Meeting | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What a loaded engine can do. Limits are enforced by `engines.checks` and `sample_checks` before it is called."""

    base_model: str
    architecture: str
    roles: tuple[Role, ...]
    vocab_size: int
    max_context: int
    """Longest sequence in tokens: a datum, or prompt plus continuation."""
    losses: tuple[str, ...]
    max_rank: int
    eos_tokens: tuple[int, ...]
    max_top_logprobs: int
    device: str
    dtype: str
    deterministic: bool
    versions: dict[str, str]
    """Versions of the libraries that the numbers depend on, for the log."""
    train_unembed: bool = True
    """Whether adapters on the unembedding can be trained and sampled."""
    layers: dict[str, tuple[int, int]] = {}
    """The linear layers that adapters attach to, by their Hugging Face names: in_features and out_features. Adapters
    from outside are checked against them; an engine that leaves them out takes none."""
    any_prompt_token: bool = True
    """Whether it tells log-probs of any token where the prompt's own stand, and draws others there
    (`SampleRequest.target_prompt_tokens`, `prompt_alternatives`); else such requests are refused."""
    run_memory_bytes: int = 0
    """What all runs in memory may take together, as `Engine.run_bytes` counts them; 0: no limit."""
    pass_tokens: int = 4096
    """Tokens that it packs into one pass, or into passes side by side. A call that has them keeps it busy, so it is
    sent operations of different runs up to as many together. A deterministic one is sent each by itself."""


T = TypeVar("T")


class RunOperation(NamedTuple, Generic[T]):
    """One operation and the run that it belongs to."""

    run_id: str
    operation: T


class Token(NamedTuple):
    """One drawn token: `top` are the best alternatives as (token, logprob), best first, when they were asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampleStep(NamedTuple):
    """One new token of one sequence of the sample `call_id`; `stop_reason` is set with its last one."""

    call_id: int
    sequence: int
    token: Token
    stop_reason: Literal["stop", "length"] | None = None


class SampleEnd(NamedTuple):
    """All sequences of a sample are complete, or it could not be carried on: by its sender's fault (UserError), or by
    the engine's, which goes on with the others."""

    call_id: int
    result: SampleResult | Exception


SampleEvent = SampleStep | SampleEnd


class PendingSnapshot(ABC):
    """A run's state at one moment, in memory of its own: what the run does next does not change it."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write its files into an empty folder. Called once, in another thread, while the engine goes on."""


class Engine(ABC):
    """A base model with adapters on it. Constructed by `load` in the engine process, never in the gateway."""

    @classmethod
    @abstractmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load the base model. Raises LoadError with a sentence that says what to change."""

    @classmethod
    def follower(cls) -> Callable[[Any, bytes], Callable[[bytes], None]] | None:
        """What a process that was started to be another rank of such an engine does (`engines.ranks.following.Join`);
        None: an engine is one process, and takes no `EngineConfig.meeting`."""
        return None

    @abstractmethod
    def info(self) -> EngineInfo:
        """What this engine can do; the same for its whole life."""

    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files that a client needs to load the tokenizer: `tokenizer.json`, `tokenizer_config.json` and, if the
        model has one, its chat template. Names are plain file names."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; no call follows."""

    # ------------------------------------------------------------------ training

    @abstractmethod
    def create_runs(self, items: Sequence[RunOperation[CreateRun]]) -> list[CreateRunResult | UserError]:
        """Make an adapter for each run: initial weights are `engines.adapters.initial_a(seed, module, ...)` for A and
        zeros for B, or those in the operation's folder. A run that exists already is replaced."""

    @abstractmethod
    def run_bytes(self, lora: LoraSpec) -> int:
        """Bytes that a run of this configuration occupies at most, whatever it does: adapter, gradients and optimizer
        state. The host keeps the sum of all runs within `EngineInfo.run_memory_bytes`."""

    @abstractmethod
    def drop_run(self, run_id: str) -> None:
        """Free a run. An unknown one is no error."""

    @abstractmethod
    def forward_backward(
        self, items: Sequence[RunOperation[ForwardBackward]]
    ) -> list[ForwardResult | UserError]:
        """Losses, log-probs (float32, from float32 logits) and gradients; gradients are added to the run's own.

        As in every call that takes operations of several runs, no two are of the same run.
        """

    @abstractmethod
    def forward(self, items: Sequence[RunOperation[Forward]]) -> list[ForwardResult | UserError]:
        """Losses and log-probs; no run changes."""

    @abstractmethod
    def optim_step(self, items: Sequence[RunOperation[OptimStep]]) -> list[OptimStepResult | UserError]:
        """One optimizer step for each run."""

    @abstractmethod
    def save_weights(self, items: Sequence[RunOperation[SaveWeights]]) -> list[SaveWeightsResult | UserError]:
        """Write each run's weights; they are on disk, synced and complete when this returns."""

    @abstractmethod
    def load_weights(self, items: Sequence[RunOperation[LoadWeights]]) -> list[LoadWeightsResult | UserError]:
        """Replace each run's weights, and its optimizer's state when asked."""

    @abstractmethod
    def snapshot(self, run_id: str) -> PendingSnapshot:
        """A copy of everything that the run's next operations depend on: adapter, optimizer, step count, randomness,
        and the pending gradient, if there is one.

        Quick, for the engine does nothing else meanwhile. Raises UserError for an unknown run.
        """

    def restore(self, run_id: str, operation: CreateRun, folder: str) -> CreateRunResult | UserError:
        """Have the run as it was when the snapshot under the storage key `folder` was taken, bit for bit, whatever is
        there of it; `operation` is the run's first.

        This is for snapshots in the layout of a checkpoint with optimizer state, which `create_runs` begins at, and
        whose `create_runs` finds a pending gradient beside it. An engine whose runs hold more than that has its own.
        """
        begun = msgspec.structs.replace(operation, folder=folder, optimizer_state=True)
        return self.create_runs([RunOperation(run_id, begun)])[0]

    # ------------------------------------------------------------------ sampling

    @abstractmethod
    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        """Queue a sample; it joins the running batch at one of the next calls of `advance`.

        `party` is an opaque name of whom it is for. An engine that cannot run everything at once shares its places
        equally among parties, and lets one that has nothing under way begin whatever the others do.

        Raises UserError when it cannot be served, also when its adapter cannot be loaded.
        """

    @abstractmethod
    def advance(self) -> list[SampleEvent]:
        """One decoding step for the samples under way; [] when there are none."""

    @abstractmethod
    def cancel_sample(self, call_id: int) -> None:
        """Forget a sample and free its slot. An unknown one is no error."""

    @property
    @abstractmethod
    def sampling(self) -> bool:
        """Whether `advance` has work."""

    @property
    def news(self) -> int | None:
        """Of an engine that draws by itself while nobody calls it: a descriptor that is readable when `advance` has
        something to tell. None: samples get on in `advance` alone, which is then called as long as there are any."""
        return None

    @property
    @abstractmethod
    def passes(self) -> int:
        """Grows with every pass through the model, in the middle of a call or a step too. Read by another thread: a
        call in which it stands still for long (setting `engine_hang_s`) is stuck, and the process is replaced."""

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Counters for the metrics page: at least `resident_runs`, `resident_adapters`, `active_samples`."""
