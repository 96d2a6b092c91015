"""What the admin API tells of each thing, as frozen dataclasses. Times are aware datetimes, UTC.

A field that a newer gateway adds is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, newest first; `next_cursor` asks for the page behind it."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Lora:
    """Configuration of an adapter."""

    rank: int
    alpha: float
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """Absolute differences between a sampler's log-probs and the trainer's, over all tokens that were drawn."""

    tokens: int
    mean_difference: float
    max_difference: float
    compared_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tuning in progress, or ended. `step` counts optimizer steps.

    `replay_difference` tells where a replay gave other numbers than before, `snapshot_problem` why the last snapshot
    could not be taken, `sampler_difference` how far a sampler's log-probs were from the trainer's; None where nothing
    of that kind is known.
    """

    run_id: str
    owner: str
    session_id: str
    status: str
    base_model: str
    engine: str
    lora: Lora
    optimizer: str
    origin_path: str | None
    user_metadata: dict[str, Any]
    step: int
    next_seq: int
    resident: bool
    created_at: datetime
    last_request_at: datetime
    replay_difference: str | None = None
    snapshot_problem: str | None = None
    sampler_difference: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state of a run, after operation `seq_id`, that the server has saved for its own recovery. `damage` says why it
    could not be restored."""

    seq_id: int
    step: int
    size_bytes: int
    damage: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `loss` is a sum over `tokens`; `grad_norm` is the L2 norm before clipping.

    A number is None when it was not finite, or is not known.
    """

    step: int
    seq_id: int
    loss: float | None
    tokens: int
    loss_per_token: float | None
    grad_norm: float | None
    learning_rate: float | None
    seconds: float
    finished_at: datetime


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights saved under a name. `kind` is `weights` (to train on), `sampler_weights` or `external_weights`."""

    path: str
    owner: str
    run_id: str
    kind: str
    name: str
    base_model: str
    lora: Lora
    has_optimizer: bool
    size_bytes: int
    public: bool
    user_metadata: dict[str, Any]
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Import:
    """An adapter from outside, as it is stored: `zero_layers` of its `layers` are zeros that it did not have."""

    checkpoint: Checkpoint
    layers: int
    zero_layers: int


@dataclass(frozen=True, slots=True)
class Deletion:
    """Checkpoints that were deleted, or would be when `dry_run`, oldest first; `more`: the limit left some out."""

    dry_run: bool
    paths: list[str]
    size_bytes: int
    more: bool


@dataclass(frozen=True, slots=True)
class Sampler:
    """What a client samples from; `path` is None for the base model alone and for weights without a name.

    An `inflight` one follows the newest inflight weights of its run.
    """

    sampler_id: str
    owner: str
    session_id: str
    engine: str
    base_model: str
    run_id: str | None
    path: str | None
    inflight: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Session:
    """A client's connection, kept by heartbeats."""

    session_id: str
    owner: str
    sdk_version: str
    display_name: str | None
    project_id: str | None
    tags: list[str]
    user_metadata: dict[str, Any]
    created_at: datetime
    heartbeat_at: datetime
    finished_at: datetime | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Future:
    """One accepted call, without its input and result."""

    request_id: str
    owner: str
    kind: str
    status: str
    engine: str
    run_id: str | None
    sampler_id: str | None
    seq_id: int
    attempts: int
    deaths: int
    error: str | None
    error_category: str | None
    error_id: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    waited_s: float | None
    ran_s: float | None


@dataclass(frozen=True, slots=True)
class SamplerComparison:
    """A comparison, and the engines: `sampled_by` drew the tokens, `trained_by` scored them in a forward pass."""

    sampler_id: str
    run_id: str | None
    sampled_by: str
    trained_by: str
    tokens: int
    mean_difference: float
    max_difference: float
    compared_at: datetime


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine process of the gateway; `problem` says why it is not ready."""

    name: str
    base_model: str
    plugin: str
    roles: list[str]
    state: str
    problem: str | None
    pid: int | None
    epoch: int
    starts: int
    open_samples: int
    resident_runs: int
    waiting_runs: int
    run_bytes: int
    run_memory_bytes: int
    evictions: int
    restores: int
    max_context: int | None
    device: str | None
    dtype: str | None
    versions: dict[str, str]
    stats: dict[str, float]


@dataclass(frozen=True, slots=True)
class Replicas:
    """The replicas of one engine of the settings: bounds of their number, how many there are to be, and their names."""

    engine: str
    min: int
    max: int
    wanted: int
    replicas: list[str]
    set_by_admin: bool


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters of the gateway process; `open_futures` by engine and status."""

    pid: int
    data_dir: str
    uptime_s: float
    resident_bytes: int
    open_futures: dict[str, dict[str, int]]
    engines: dict[str, dict[str, float]]
