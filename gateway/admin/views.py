"""What the admin API shows of each record, as its OpenAPI page describes it. Times are ISO 8601, UTC."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gateway.dispatch import Dispatcher
from gateway.store.records import (
    Checkpoint,
    Comparison,
    DutyRecord,
    Future,
    Run,
    Sampler,
    Session,
    Snapshot,
    Step,
)

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """One page of a list: of what grows the newest first."""

    items: list[T]
    next_cursor: Annotated[
        str | None, Field(description="pass as `cursor` for the next page; null: this is the last")
    ]


class ComparisonView(BaseModel):
    """Absolute differences between a sampler's log-probs and the trainer's, over all tokens that were drawn."""

    tokens: int
    mean_difference: float
    max_difference: float
    compared_at: datetime


class RunView(BaseModel):
    """One fine-tuning in progress, or ended."""

    run_id: str
    owner: str
    session_id: str
    status: Annotated[str, Field(description="creating, active, failed, unloaded, storage")]
    base_model: str
    engine: str
    lora: Annotated[
        dict[str, Any], Field(description="rank, alpha, seed, train_attn, train_mlp, train_unembed")
    ]
    optimizer: str
    origin_path: Annotated[str | None, Field(description="checkpoint that the run began at")]
    user_metadata: dict[str, Any]
    step: Annotated[int, Field(description="optimizer steps taken")]
    next_seq: Annotated[int, Field(description="number of the first operation that is not settled")]
    resident: Annotated[bool, Field(description="whether its engine has it in memory now")]
    replay_difference: Annotated[
        str | None, Field(description="where a replay gave other numbers than before; null: nowhere")
    ]
    snapshot_problem: Annotated[
        str | None, Field(description="why its last snapshot could not be taken; null: nothing is known")
    ]
    sampler_difference: Annotated[
        ComparisonView | None,
        Field(description="the newest comparison of a sampler of its weights; null: none"),
    ]
    created_at: datetime
    last_request_at: datetime


class StepView(BaseModel):
    """One optimizer step and the passes since the one before."""

    step: int
    seq_id: int
    loss: Annotated[float, Field(description="sum over tokens, weighted as the client asked")]
    tokens: Annotated[int, Field(description="of the passes' data, those of weight 0 included")]
    loss_per_token: float | None
    grad_norm: Annotated[float | None, Field(description="global L2 norm before clipping")]
    learning_rate: float | None
    seconds: Annotated[float, Field(description="engine time of the step and its passes")]
    finished_at: datetime


class SnapshotView(BaseModel):
    """A state of a run that the server has saved for its own recovery."""

    seq_id: Annotated[int, Field(description="the last operation that it contains")]
    step: Annotated[int, Field(description="optimizer steps that it contains")]
    size_bytes: int
    damage: Annotated[str | None, Field(description="why it could not be restored; null: nothing is known")]
    created_at: datetime


class CheckpointView(BaseModel):
    """Weights saved under a name."""

    path: Annotated[str, Field(examples=["tinker://SESSION:train:0/weights/final"])]
    owner: str
    run_id: str
    kind: Annotated[
        str, Field(description="weights (to train on), sampler_weights or external_weights (to download)")
    ]
    name: str
    base_model: str
    lora: dict[str, Any]
    has_optimizer: bool
    size_bytes: int
    public: bool
    user_metadata: dict[str, Any]
    created_at: datetime
    expires_at: datetime | None


class ImportView(BaseModel):
    """An adapter from outside, as it is stored."""

    checkpoint: CheckpointView
    layers: Annotated[int, Field(description="layers that the stored adapter has")]
    zero_layers: Annotated[
        int, Field(description="of these, layers that the adapter does not have: they are zeros and stay so")
    ]


class DeletionView(BaseModel):
    """Checkpoints that have been deleted, or would be, oldest first."""

    dry_run: bool
    paths: list[str]
    size_bytes: Annotated[int, Field(description="of all of them; shared files stay while others need them")]
    more: Annotated[bool, Field(description="whether the limit left some out: ask again")]


class SamplerView(BaseModel):
    """What a client samples from: a base model, a checkpoint, or weights that have no name."""

    sampler_id: str
    owner: str
    session_id: str
    engine: str
    base_model: str
    run_id: Annotated[str | None, Field(description="whose weights; null: the base model alone")]
    path: Annotated[str | None, Field(description="checkpoint; null: the base model, or unnamed weights")]
    inflight: Annotated[bool, Field(description="whether it follows its run's newest inflight weights")]
    created_at: datetime


class Promotion(BaseModel):
    """The name that the weights of an unnamed sampler get."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)]
    ttl_seconds: Annotated[int | None, Field(ge=3600, le=10 * 366 * 86400)] = None


class SessionView(BaseModel):
    """A client's connection."""

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


class FutureView(BaseModel):
    """One accepted call; its input and result are not shown."""

    request_id: str
    owner: str
    kind: str
    status: Annotated[str, Field(description="queued, running, done, failed")]
    engine: Annotated[str, Field(description="which engine answers, or answered")]
    run_id: str | None
    sampler_id: str | None
    seq_id: int
    attempts: Annotated[int, Field(description="times that it was sent to an engine")]
    deaths: Annotated[int, Field(description="engines that died while they performed it")]
    error: str | None
    error_category: str | None
    error_id: Annotated[str | None, Field(description="the log has the details under this id")]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    waited_s: Annotated[float | None, Field(description="from acceptance to the engine")]
    ran_s: Annotated[float | None, Field(description="in the engine")]


class EngineView(BaseModel):
    """One engine process."""

    name: str
    base_model: str
    plugin: str
    roles: list[str]
    state: Annotated[str, Field(description="waiting, starting, ready, down, stopped")]
    problem: str | None
    pid: int | None
    epoch: Annotated[int, Field(description="raised at each start, over all gateways")]
    starts: Annotated[int, Field(description="since this gateway process began")]
    open_samples: Annotated[int, Field(description="samples that it has, waiting or being drawn")]
    resident_runs: int
    waiting_runs: Annotated[
        int, Field(description="runs with work for which there is no room in its memory now")
    ]
    run_bytes: Annotated[int, Field(description="what the runs in its memory occupy")]
    run_memory_bytes: Annotated[int, Field(description="what they may occupy together; 0: no limit")]
    evictions: Annotated[
        int, Field(description="runs that left its memory for others, since the gateway began")
    ]
    restores: Annotated[
        int, Field(description="runs that came back into its memory, since the gateway began")
    ]
    max_context: int | None
    device: str | None
    dtype: str | None
    versions: dict[str, str]
    stats: dict[str, float]


class DutyView(BaseModel):
    """Something that the gateways do in the background, now and then."""

    name: str
    holder: Annotated[str | None, Field(description="the gateway process that is at it now")]
    runs: Annotated[int, Field(description="times that it was finished or failed")]
    failures: int
    done: Annotated[int, Field(description="things removed, ended or freed in all")]
    last_run_at: datetime | None
    last_seconds: float | None
    last_done: int | None
    last_error: Annotated[str | None, Field(description="of the newest failure, however long ago")]
    failed_at: datetime | None


class MetricsView(BaseModel):
    """Counters of this gateway process, and where it is."""

    pid: int
    data_dir: Annotated[str, Field(description="its data folder, on its machine")]
    uptime_s: float
    resident_bytes: Annotated[int, Field(description="memory of the gateway process")]
    open_futures: Annotated[dict[str, dict[str, int]], Field(description="by engine and status")]
    engines: dict[str, dict[str, float]]


def comparison_view(comparison: Comparison) -> ComparisonView:
    return ComparisonView(
        tokens=comparison.tokens,
        mean_difference=comparison.mean,
        max_difference=comparison.largest,
        compared_at=moment(comparison.compared_at),
    )


def run_view(run: Run, dispatcher: Dispatcher | None) -> RunView:
    """`dispatcher` feeds its engine, if that is one of this gateway's."""
    training = None if dispatcher is None else dispatcher.training
    return RunView(
        run_id=run.run_id,
        owner=run.owner,
        session_id=run.session_id,
        status=run.status,
        base_model=run.base_model,
        engine=run.engine,
        lora=run.lora,
        optimizer=run.optimizer,
        origin_path=run.origin_path,
        user_metadata=run.user_metadata,
        step=run.step,
        next_seq=run.next_seq,
        resident=training is not None and training.residency.holds(run.run_id),
        replay_difference=run.replay_difference,
        snapshot_problem=None if training is None else training.snapshots.problems.get(run.run_id),
        sampler_difference=None if run.comparison is None else comparison_view(run.comparison),
        created_at=moment(run.created_at),
        last_request_at=moment(run.last_request_at),
    )


def step_view(step: Step) -> StepView:
    return StepView(
        step=step.step,
        seq_id=step.seq_id,
        loss=step.loss,
        tokens=step.tokens,
        loss_per_token=step.loss / step.tokens if step.tokens else None,
        grad_norm=step.grad_norm,
        learning_rate=step.learning_rate,
        seconds=step.seconds,
        finished_at=moment(step.finished_at),
    )


def snapshot_view(snapshot: Snapshot) -> SnapshotView:
    return SnapshotView(
        seq_id=snapshot.seq_id,
        step=snapshot.step,
        size_bytes=snapshot.size_bytes,
        damage=snapshot.damage,
        created_at=moment(snapshot.created_at),
    )


def checkpoint_view(checkpoint: Checkpoint) -> CheckpointView:
    return CheckpointView(
        path=checkpoint.path,
        owner=checkpoint.owner,
        run_id=checkpoint.run_id,
        kind=checkpoint.kind,
        name=checkpoint.name,
        base_model=checkpoint.base_model,
        lora=checkpoint.lora,
        has_optimizer=checkpoint.has_optimizer,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=checkpoint.user_metadata,
        created_at=moment(checkpoint.created_at),
        expires_at=_maybe(checkpoint.expires_at),
    )


def sampler_view(sampler: Sampler) -> SamplerView:
    return SamplerView(
        sampler_id=sampler.sampler_id,
        owner=sampler.owner,
        session_id=sampler.session_id,
        engine=sampler.engine,
        base_model=sampler.base_model,
        run_id=sampler.run_id,
        path=sampler.path,
        inflight=sampler.inflight_seq is not None,
        created_at=moment(sampler.created_at),
    )


def session_view(session: Session) -> SessionView:
    return SessionView(
        session_id=session.session_id,
        owner=session.owner,
        sdk_version=session.sdk_version,
        display_name=session.display_name,
        project_id=session.project_id,
        tags=session.tags,
        user_metadata=session.user_metadata,
        created_at=moment(session.created_at),
        heartbeat_at=moment(session.heartbeat_at),
        finished_at=_maybe(session.finished_at),
        finish_reason=session.finish_reason,
    )


def future_view(future: Future) -> FutureView:
    started, finished = future.started_at, future.finished_at
    return FutureView(
        request_id=future.request_id,
        owner=future.owner,
        kind=future.kind,
        status=future.status,
        engine=future.engine,
        run_id=future.run_id,
        sampler_id=future.sampler_id,
        seq_id=future.seq_id,
        attempts=future.attempts,
        deaths=future.deaths,
        error=future.error,
        error_category=future.error_category,
        error_id=future.error_id,
        created_at=moment(future.created_at),
        started_at=_maybe(started),
        finished_at=_maybe(finished),
        waited_s=None if started is None else started - future.created_at,
        ran_s=None if started is None or finished is None else finished - started,
    )


def engine_view(dispatcher: Dispatcher) -> EngineView:
    supervisor, residency = dispatcher.supervisor, dispatcher.training.residency
    engine, info, process = supervisor.engine, supervisor.info, supervisor.process
    return EngineView(
        name=engine.name,
        base_model=engine.base_model,
        plugin=engine.plugin,
        roles=list(engine.roles),
        state=supervisor.state,
        problem=supervisor.problem,
        pid=process.pid if process is not None else None,
        epoch=supervisor.epoch,
        starts=supervisor.starts,
        open_samples=dispatcher.load,
        resident_runs=len(residency),
        waiting_runs=residency.waiting,
        run_bytes=residency.used,
        run_memory_bytes=residency.limit,
        evictions=residency.evictions,
        restores=residency.restores,
        max_context=info.max_context if info is not None else None,
        device=info.device if info is not None else None,
        dtype=info.dtype if info is not None else None,
        versions=info.versions if info is not None else {},
        stats=process.stats if process is not None else {},
    )


def duty_view(duty: DutyRecord) -> DutyView:
    return DutyView(
        name=duty.name,
        holder=duty.holder if duty.expires_at > time.time() else None,
        runs=duty.runs,
        failures=duty.failures,
        done=duty.done,
        last_run_at=_maybe(duty.last_run_at),
        last_seconds=duty.last_seconds,
        last_done=duty.last_done,
        last_error=duty.last_error,
        failed_at=_maybe(duty.failed_at),
    )


def moment(seconds: float) -> datetime:
    """A time with its zone."""
    return datetime.fromtimestamp(seconds, UTC)


def _maybe(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)
