"""Rows as frozen dataclasses. A record is what was read; it never talks to the database."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class FutureStatus(enum.StrEnum):
    """Where an accepted call is."""

    QUEUED = "queued"  # accepted, waits for its turn
    RUNNING = "running"  # sent to an engine; after that engine's death it is sent again
    DONE = "done"  # its result is stored
    FAILED = "failed"  # its error is stored; it had no effect


class RunStatus(enum.StrEnum):
    """What can be done with a run."""

    CREATING = "creating"  # accepted; its first operation has not been settled
    ACTIVE = "active"  # trains
    FAILED = "failed"  # could not be created; nothing else will succeed
    UNLOADED = "unloaded"  # ended by its owner; readable, its checkpoints stay
    STORAGE = "storage"  # never trained: it holds a checkpoint that was copied or imported


class CheckpointKind(enum.StrEnum):
    """Second segment of a tinker:// path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"  # files for downloading; encrypted ones nobody here can read


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its hash; the key itself is never stored."""

    key_hash: str
    owner: str
    admin: bool
    label: str
    created_at: float

    @property
    def key_id(self) -> int:
        """A number to name it by: the first 48 bits of its hash, which `python -m gateway.keys list` shows in hex."""
        return int(self.key_hash[:12], 16)


@dataclass(frozen=True, slots=True)
class Session:
    session_id: str
    owner: str
    idempotency_key: str | None
    user_metadata: dict[str, Any]
    tags: list[str]
    sdk_version: str
    project_id: str | None
    display_name: str | None
    created_at: float
    heartbeat_at: float
    finished_at: float | None = None
    finish_reason: str | None = None
    finish_detail: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a sampler's log-probs were from the trainer's: absolute differences over so many tokens. One that is not
    finite is nan."""

    tokens: int
    mean: float
    largest: float
    compared_at: float


@dataclass(frozen=True, slots=True)
class Run:
    run_id: str
    owner: str
    session_id: str
    model_seq_id: int
    engine: str
    base_model: str
    lora: dict[str, Any]
    optimizer: str
    origin_path: str | None
    origin_folder: str | None
    user_metadata: dict[str, Any]
    created_at: float
    last_request_at: float
    status: RunStatus = RunStatus.CREATING
    next_seq: int = 0
    step: int = 0
    pending_loss: float = 0.0
    pending_tokens: int = 0
    pending_seconds: float = 0.0
    pruned_seq: int = 0
    replay_difference: str | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Future:
    """One accepted call, without its input and result. `digest` is of what was sent, to tell another call under the
    same number; None: not known. `result_digest` and `measure` (a loss, or a gradient's norm) are what its replay is
    compared with; `input_bytes` is the size of its input."""

    request_id: str
    owner: str
    engine: str
    kind: str
    seq_id: int
    created_at: float
    run_id: str | None = None
    sampler_id: str | None = None
    status: FutureStatus = FutureStatus.QUEUED
    epoch: int | None = None
    attempts: int = 0
    deaths: int = 0
    context: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    digest: bytes | None = None
    result_digest: bytes | None = None
    measure: float | None = None
    input_bytes: int = 0
    error: str | None = None
    error_category: str | None = None
    error_id: str | None = None
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def open(self) -> bool:
        """Whether it still waits for its outcome."""
        return self.status in (FutureStatus.QUEUED, FutureStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step was, for the metrics of a run; `loss` is a sum over `tokens`."""

    run_id: str
    step: int
    seq_id: int
    loss: float
    tokens: int
    grad_norm: float | None
    learning_rate: float | None
    seconds: float
    finished_at: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state after operation `seq_id`, with `step` optimizer steps. `checksums` has the SHA-256, hex, of each
    file; `damage` says why it could not be restored when that was tried; since `superseded_at` newer ones suffice."""

    run_id: str
    seq_id: int
    step: int
    folder: str
    checksums: dict[str, str]
    size_bytes: int
    created_at: float
    damage: str | None = None
    superseded_at: float | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: str
    owner: str
    run_id: str
    kind: CheckpointKind
    name: str
    folder: str
    base_model: str
    lora: dict[str, Any]
    has_optimizer: bool
    size_bytes: int
    public: bool
    user_metadata: dict[str, Any]
    created_at: float
    expires_at: float | None

    @property
    def checkpoint_id(self) -> str:
        """The id on the wire: kind and name."""
        return f"{self.kind}/{self.name}"

    @property
    def reference(self) -> Reference:
        """What to hand in with whatever is to keep this checkpoint's folder."""
        return Reference(self.path, self.folder)


@dataclass(frozen=True, slots=True)
class Sampler:
    """`inflight_seq` is set when it follows its run: it samples the newest weights that were saved so.
    `checkpoint_gone` says that what it was made from is no checkpoint any more, `released_at` when its weights were
    given up, `size_bytes` what those occupy that are no checkpoint, `sampled_at`, to a minute, its last use."""

    sampler_id: str
    owner: str
    session_id: str
    engine: str
    base_model: str
    run_id: str | None
    path: str | None
    folder: str | None
    created_at: float
    inflight_seq: int | None = None
    released_at: float | None = None
    checkpoint_gone: bool = False
    size_bytes: int = 0
    sampled_at: float | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The stored folder of a checkpoint, as it was looked up: who writes it down must find it still there."""

    path: str
    folder: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call has used. `prefill_tokens` are prompt tokens that were computed, `cached_tokens` those that were not,
    because an earlier request had. `session_id` is empty where there is none."""

    owner: str
    session_id: str
    base_model: str
    training_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What an owner has used in one hour, which began at `bucket`, in one session of one base model."""

    bucket: int
    owner: str
    session_id: str
    base_model: str
    training_tokens: int
    prefill_tokens: int
    cached_tokens: int
    sampled_tokens: int
    checkpoints: int
    project_id: str | None


@dataclass(frozen=True, slots=True)
class Interval:
    """Bytes that were stored from one moment to another; `until` None: they are there, for good as far as is known."""

    owner: str
    base_model: str
    project_id: str | None
    size_bytes: int
    since: float
    until: float | None


class AuditTopic(enum.StrEnum):
    """What an entry of the audit log is about."""

    CHECKPOINTS = "checkpoints"
    PROJECTS = "projects"
    ORGANIZATIONS = "organizations"  # keys, of which owners are made
    RUNS = "runs"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    owner: str
    topic: AuditTopic
    event: str
    details: dict[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class StoredLoss:
    """A loss that a client has traced; `body` is empty when it was refused with `error`."""

    loss_id: str
    owner: str
    session_id: str
    name: str
    body: bytes
    error: str | None
    created_at: float


@dataclass(frozen=True, slots=True)
class DutyRecord:
    """What the gateways do in the background, and how it went. `done` counts things; times in seconds."""

    name: str
    holder: str | None
    expires_at: float
    last_run_at: float | None
    last_seconds: float | None
    last_done: int | None
    last_error: str | None
    failed_at: float | None
    runs: int
    failures: int
    done: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one future: its result's bytes, or its error; and what else the same transaction stores. `digest`
    is the engine's own of the result; `fence` is the epoch of whoever says so, where that is not the one in which the
    future was claimed."""

    future: Future
    result: bytes | None = None
    digest: bytes | None = None
    error: str | None = None
    error_category: str | None = None
    error_id: str | None = None
    summary: dict[str, float] = field(default_factory=dict)
    usage: Usage | None = None
    checkpoint: Checkpoint | None = None
    overwrite: bool = False
    sampler: Sampler | None = None
    fence: int | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None


@dataclass(frozen=True, slots=True)
class Settled:
    """A future after settling. `orphaned_folder` is one that nothing refers to any more."""

    future: Future
    result: bytes | None
    orphaned_folder: str | None = None
