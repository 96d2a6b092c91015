"""What the command line shows of each thing: its columns, and a thing's row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console

from sdk.admin_records import Checkpoint, Engine, Future, Run, Sampler, Session, Snapshot, Step
from sdk.cli_layout import Column, Row, ago, number, show_facts, show_rows, size, span
from sdk.plots import curve

LOCAL_OWNER = "local"
"""The owner of everything while a gateway has no keys: not worth a column where nobody else is."""
_SILENT_S = 120.0

RUNS = (
    Column("run"),
    Column("status"),
    Column("model"),
    Column("rank", "rank {}", right=True),
    Column("step", "step {}", right=True),
    Column("where"),
    Column("owner", "of {}"),
    Column("last used", "used {}"),
)
CHECKPOINTS = (
    Column("checkpoint"),
    Column("model"),
    Column("rank", "rank {}", right=True),
    Column("size", right=True),
    Column("owner", "of {}"),
    Column("saved", "saved {}"),
    Column("shared"),
    Column("expires", "expires {}"),
)
SAMPLERS = (
    Column("sampler"),
    Column("model"),
    Column("weights"),
    Column("owner", "of {}"),
    Column("made", "made {}"),
)
SESSIONS = (
    Column("session"),
    Column("state"),
    Column("sdk", "SDK {}"),
    Column("name"),
    Column("owner", "of {}"),
    Column("opened", "opened {}"),
    Column("last seen", "seen {}"),
)
FUTURES = (
    Column("call"),
    Column("kind"),
    Column("status"),
    Column("engine"),
    Column("owner", "of {}"),
    Column("waited", "waited {}", right=True),
    Column("ran", "ran {}", right=True),
    Column("accepted", "accepted {}"),
)
ENGINES = (
    Column("engine"),
    Column("state"),
    Column("model"),
    Column("plugin"),
    Column("device"),
    Column("dtype"),
    Column("context", "context {}", right=True),
    Column("runs", "{} runs in memory", right=True),
    Column("their memory", "{}", right=True),
    Column("evicted", "evicted {}", right=True),
    Column("starts", "starts {}", right=True),
    Column("pid", "pid {}", right=True),
)
STEPS = (
    Column("step", "step {}", right=True),
    Column("loss/token", "loss/token {}", right=True),
    Column("loss", "loss {}", right=True),
    Column("grad norm", "grad norm {}", right=True),
    Column("lr", "lr {}", right=True),
    Column("tokens", "{} tokens", right=True),
    Column("took", "took {}", right=True),
    Column("finished"),
)


def show_list(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """A list without the columns that tell nothing: empty in every row, or the one owner of a gateway without keys."""
    kept = [0]
    for index, column in enumerate(columns[1:], 1):
        told = {row.cells[index] for row in rows} - {"", LOCAL_OWNER if column.title == "owner" else ""}
        if told:
            kept.append(index)
    shown = [Row(tuple(row.cells[index] for index in kept), row.note) for row in rows]
    show_rows(console, [columns[index] for index in kept], shown)


def run_row(run: Run) -> Row:
    """A line of `tandem runs`."""
    return Row(
        (
            run.run_id,
            run.status,
            run.base_model,
            str(run.lora.rank),
            str(run.step),
            "in memory" if run.resident else "",
            run.owner,
            ago(run.last_request_at),
        )
    )


def checkpoint_row(checkpoint: Checkpoint) -> Row:
    """A line of `tandem checkpoints`; the kind stands in the path."""
    return Row(
        (
            checkpoint.path,
            checkpoint.base_model,
            str(checkpoint.lora.rank),
            size(checkpoint.size_bytes),
            checkpoint.owner,
            ago(checkpoint.created_at),
            "public" if checkpoint.public else "",
            "" if checkpoint.expires_at is None else ago(checkpoint.expires_at),
        )
    )


def sampler_row(sampler: Sampler) -> Row:
    """A line of `tandem samplers`; unnamed weights are told by their run."""
    unnamed = f"of {sampler.run_id}, {'inflight' if sampler.inflight else 'unnamed'}"
    weights = sampler.path or (unnamed if sampler.run_id is not None else "")
    return Row((sampler.sampler_id, sampler.base_model, weights, sampler.owner, ago(sampler.created_at)))


def session_row(session: Session) -> Row:
    """A line of `tandem sessions`."""
    return Row(
        (
            session.session_id,
            state_of(session),
            session.sdk_version,
            session.display_name or ", ".join(session.tags),
            session.owner,
            ago(session.created_at),
            ago(session.finished_at or session.heartbeat_at),
        )
    )


def state_of(session: Session, now: datetime | None = None) -> str:
    """A client that has ended without a word stops sending heartbeats, which every SDK does several times a minute."""
    if session.finished_at is not None:
        return "finished"
    silent_s = ((now or datetime.now(UTC)) - session.heartbeat_at).total_seconds()
    return "silent" if silent_s > _SILENT_S else "open"


def future_row(future: Future) -> Row:
    """A line of `tandem futures`, and what went wrong."""
    return Row(
        (
            future.request_id,
            future.kind,
            future.status,
            future.engine,
            future.owner,
            span(future.waited_s),
            span(future.ran_s),
            ago(future.created_at),
        ),
        future.error and f"{future.error_category}: {future.error}",
    )


def engine_row(engine: Engine) -> Row:
    """A line of `tandem engines`, and what is wrong."""
    return Row(
        (
            engine.name,
            engine.state,
            engine.base_model,
            engine.plugin,
            engine.device or "",
            engine.dtype or "",
            "" if engine.max_context is None else str(engine.max_context),
            str(engine.resident_runs),
            memory_of(engine),
            str(engine.evictions or ""),
            str(engine.starts),
            "" if engine.pid is None else str(engine.pid),
        ),
        None if engine.state == "ready" else engine.problem,
    )


def memory_of(engine: Engine) -> str:
    """What the runs in its memory occupy, of what they may."""
    limit = f" of {size(engine.run_memory_bytes)}" if engine.run_memory_bytes else ""
    return f"{size(engine.run_bytes)}{limit}" if engine.run_bytes or limit else ""


def step_row(step: Step) -> Row:
    """A line of the metrics of a run."""
    return Row(
        (
            str(step.step),
            number(step.loss_per_token),
            number(step.loss),
            number(step.grad_norm),
            number(step.learning_rate),
            str(step.tokens),
            span(step.seconds),
            ago(step.finished_at),
        )
    )


def show_run(
    console: Console, run: Run, checkpoints: Sequence[Checkpoint], snapshots: Sequence[Snapshot]
) -> None:
    """All that is known of a run but its metrics."""
    lora = run.lora
    parts = {"attention": lora.train_attn, "MLP": lora.train_mlp, "unembedding": lora.train_unembed}
    trained = ", ".join(name for name, is_trained in parts.items() if is_trained)
    facts = [
        ("run", run.run_id),
        ("status", run.status),
        ("in memory", f"{'yes' if run.resident else 'no'}, engine {run.engine}"),
        ("model", run.base_model),
        ("adapter", f"rank {lora.rank}, alpha {lora.alpha:g}, seed {lora.seed}; {trained}"),
        ("began at", run.origin_path or "a fresh adapter"),
        ("owner", run.owner),
        ("session", run.session_id),
        *((name, str(value)) for name, value in run.user_metadata.items()),
        ("created", f"{ago(run.created_at)} ({run.created_at:%Y-%m-%d %H:%M:%S} UTC)"),
        ("last used", ago(run.last_request_at)),
        ("steps", str(run.step)),
        *(("saved", checkpoint.path) for checkpoint in checkpoints),
        *(("recovers from", _snapshot_text(snapshot)) for snapshot in snapshots),
        *((name, problem) for name, problem in _problems(run) if problem is not None),
    ]
    show_facts(console, facts)


def _snapshot_text(snapshot: Snapshot) -> str:
    damaged = "" if snapshot.damage is None else f", damaged: {snapshot.damage}"
    return f"step {snapshot.step}, {ago(snapshot.created_at)}{damaged}"


def _problems(run: Run) -> list[tuple[str, str | None]]:
    return [("no snapshot", run.snapshot_problem), ("replay", run.replay_difference)]


def plot_text(steps: Sequence[Step], width: int) -> str | None:
    """The loss per token by step, in characters; None when `plotext` is not installed or there is nothing to draw."""
    points = [
        (step.step, step.loss_per_token)
        for step in steps
        if step.loss_per_token is not None and math.isfinite(step.loss_per_token)
    ]
    return curve(points, "loss per token", min(width, 100))
