"""The tables. Guarantees that matter are the schema's: one row for each natural key, one running operation a run.

Times are seconds since the epoch, UTC. JSON columns hold small objects only; what can be large (inputs, results) has
tables of its own, so that claims and lists never read it.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TextClause,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

ALIVE = text("finished_at is null")
"""Sessions that have not ended."""
SOLE = text("(path is null or checkpoint_gone) and folder is not null and released_at is null")
"""Samplers of weights that are no checkpoint, or not any more, and are still kept."""
ENDED = text("status in ('unloaded', 'failed')")
"""Runs that take no operation any more."""
OPEN = text("status in ('queued', 'running')")
"""Futures that still wait for their outcome."""
SPENT = text(
    "finished_at is not null and (status = 'failed' or kind not in "
    "('create_run', 'forward_backward', 'optim_step', 'load_weights'))"
)
"""Futures that no replay applies again: those that only read, whose outcome is stored elsewhere, or that failed."""


def _partial(name: str, condition: TextClause, *columns: str) -> Index:
    """An index of the rows that a condition holds for. A query uses it that states the same condition, word by word."""
    return Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


_Counted = BigInteger().with_variant(Integer(), "sqlite")
"""The type of keys that the database counts up; SQLite does so for one type only."""

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String, primary_key=True, comment="SHA-256 of the key, hex"),
    Column("owner", String, nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("label", String, nullable=False),
    Column("created_at", Double, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", LargeBinary, nullable=False, comment="random; signs tokens and addresses"),
    Column("created_at", Double, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("idempotency_key", String, comment="of the request that created it; a retry finds it"),
    Column("user_metadata", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("sdk_version", String, nullable=False),
    Column("project_id", String),
    Column("display_name", String),
    Column("created_at", Double, nullable=False),
    Column("heartbeat_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("finish_reason", String),
    Column("finish_detail", String),
    UniqueConstraint("owner", "idempotency_key"),
    Index(None, "owner", "created_at"),
    _partial("ix_sessions_alive", ALIVE, "created_at"),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("session_id", String, ForeignKey("sessions.session_id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("engine", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("lora", JSON, nullable=False, comment="rank, seed, alpha, train_attn, train_mlp, train_unembed"),
    Column("optimizer", String, nullable=False),
    Column("origin_path", String, comment="tinker:// path that the log begins at"),
    Column("origin_folder", String, comment="storage key of the same; kept as long as the log"),
    Column("user_metadata", JSON, nullable=False),
    Column("status", String, nullable=False, comment="creating, active, failed, unloaded, storage"),
    Column("next_seq", BigInteger, nullable=False, comment="first seq_id that is not settled"),
    Column("step", Integer, nullable=False, comment="optimizer steps taken"),
    Column("pending_loss", Double, nullable=False, comment="sums since the last optimizer step"),
    Column("pending_tokens", BigInteger, nullable=False),
    Column("pending_seconds", Double, nullable=False),
    Column(
        "pruned_seq",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="inputs from 1 to this one may be gone: snapshots cover them",
    ),
    Column("replay_difference", String, comment="what the last replay that gave other numbers has shown"),
    Column(
        "comparison",
        JSON(none_as_null=True),
        comment="how far a sampler's log-probs were from the trainer's when that was last asked for",
    ),
    Column("created_at", Double, nullable=False),
    Column("last_request_at", Double, nullable=False),
    Index(None, "owner", "created_at"),
    Index(None, "session_id"),
    Index(None, "origin_folder"),
    _partial("ix_runs_ended", ENDED, "last_request_at"),
)

futures = Table(
    "futures",
    metadata,
    Column("request_id", String, primary_key=True, comment="a function of the natural key"),
    Column("owner", String, nullable=False),
    Column("engine", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("run_id", String, ForeignKey("runs.run_id")),
    Column("sampler_id", String),
    Column("seq_id", BigInteger, nullable=False),
    Column("status", String, nullable=False, comment="queued, running, done, failed"),
    Column("epoch", BigInteger, comment="of the engine that it was sent to"),
    Column("attempts", Integer, nullable=False, comment="times that it was sent to an engine"),
    Column(
        "deaths",
        Integer,
        nullable=False,
        server_default="0",
        comment="engines that died while they performed it",
    ),
    Column("context", JSON, nullable=False, comment="what settling needs: names, paths, ids"),
    Column("folder", String, comment="storage key that this operation reads or writes"),
    Column("digest", LargeBinary, comment="128 bits of what was sent; none: not known"),
    Column("result_digest", LargeBinary, comment="128 bits of the result, of a deterministic engine"),
    Column("measure", Double, comment="loss of a pass, gradient norm of a step"),
    Column("input_bytes", BigInteger, nullable=False, server_default="0", comment="of its row in inputs"),
    Column("error", String),
    Column("error_category", String),
    Column("error_id", String),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    UniqueConstraint("run_id", "seq_id"),
    _partial("ix_futures_open", OPEN, "engine", "created_at"),
    Index(
        "uq_futures_running",
        "run_id",
        unique=True,
        sqlite_where=text("status = 'running' and run_id is not null"),
        postgresql_where=text("status = 'running' and run_id is not null"),
    ),
    Index(None, "owner", "created_at"),
    Index(None, "created_at"),
    _partial("ix_futures_folder", text("folder is not null"), "folder"),
    _partial("ix_futures_spent", SPENT, "finished_at"),
)

inputs = Table(
    "inputs",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

results = Table(
    "results",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("stored_at", Double, nullable=False),
    Index(None, "stored_at"),
)

steps = Table(
    "steps",
    metadata,
    Column("run_id", String, ForeignKey("runs.run_id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("seq_id", BigInteger, nullable=False),
    Column("loss", Double, nullable=False, comment="sum over the tokens since the last step"),
    Column("tokens", BigInteger, nullable=False),
    Column("grad_norm", Double),
    Column("learning_rate", Double),
    Column("seconds", Double, nullable=False, comment="engine time of the step and its passes"),
    Column("finished_at", Double, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", String, ForeignKey("runs.run_id"), primary_key=True),
    Column("seq_id", BigInteger, primary_key=True, comment="the last operation that it contains"),
    Column("step", Integer, nullable=False, comment="optimizer steps that it contains"),
    Column("folder", String, nullable=False, comment="storage key"),
    Column("checksums", JSON, nullable=False, comment="SHA-256 of each file"),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("damage", String, comment="why it could not be restored; none: not known to be damaged"),
    Column("superseded_at", Double, comment="since when newer ones suffice; its files go some time later"),
    Index(None, "folder"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("path", String, primary_key=True, comment="tinker://run/kind/name"),
    Column("owner", String, nullable=False),
    Column("run_id", String, ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String, nullable=False, comment="weights, sampler_weights, external_weights"),
    Column("name", String, nullable=False),
    Column("folder", String, nullable=False, comment="storage key"),
    Column("base_model", String, nullable=False),
    Column("lora", JSON, nullable=False),
    Column("has_optimizer", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Index(None, "owner", "created_at"),
    Index(None, "run_id"),
    Index(None, "folder"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("session_id", String, ForeignKey("sessions.session_id"), nullable=False),
    Column("engine", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("run_id", String, comment="whose weights, if any"),
    Column("path", String, comment="tinker:// path, for named weights"),
    Column("folder", String, comment="storage key of the adapter; none: the base model"),
    Column("created_at", Double, nullable=False),
    Column(
        "inflight_seq",
        BigInteger,
        comment="seq_id of the save of an inflight sampler: all of a run sample the highest one's folder",
    ),
    Column("released_at", Double, comment="when unnamed weights were given up"),
    Column(
        "checkpoint_gone",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="whether what stood under its path was deleted or replaced",
    ),
    Index(None, "session_id"),
    Index(None, "folder"),
    Index(None, "run_id", "inflight_seq"),
    Column(
        "size_bytes",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="of weights that are no checkpoint, or not any more",
    ),
    Column("sampled_at", Double, comment="when it was last used, to a minute; none: not yet"),
    _partial("ix_samplers_sole", SOLE, "session_id"),
    _partial("ix_samplers_sole_owner", SOLE, "owner"),
)

sampler_clients = Table(
    "sampler_clients",
    metadata,
    Column("sampler_id", String, primary_key=True),
    Column(
        "joined", Integer, nullable=False, comment="clients that have asked for a number; the first has none"
    ),
)

usage = Table(
    "usage",
    metadata,
    Column("bucket", BigInteger, primary_key=True, comment="the hour's first second"),
    Column("owner", String, primary_key=True),
    Column("session_id", String, primary_key=True, comment="empty: none"),
    Column("base_model", String, primary_key=True),
    Column("training_tokens", BigInteger, nullable=False),
    Column("prefill_tokens", BigInteger, nullable=False, comment="of prompts, computed"),
    Column("cached_tokens", BigInteger, nullable=False, comment="of prompts, found computed"),
    Column("sampled_tokens", BigInteger, nullable=False),
    Column("checkpoints", BigInteger, nullable=False, comment="saved"),
)

stored_bytes = Table(
    "stored_bytes",
    metadata,
    Column("interval_id", _Counted, primary_key=True),
    Column("path", String, nullable=False, comment="of the checkpoint; one that is replaced begins anew"),
    Column("owner", String, nullable=False),
    Column("session_id", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("stored_at", Double, nullable=False),
    Column("removed_at", Double),
    Column("expires_at", Double),
    Index(None, "owner", "stored_at"),
    Index(None, "path"),
)

audit = Table(
    "audit",
    metadata,
    Column("entry_id", _Counted, primary_key=True),
    Column("owner", String, nullable=False, comment="whose thing it is about"),
    Column("topic", String, nullable=False, comment="checkpoints, projects, organizations, runs"),
    Column("event", String, nullable=False),
    Column("details", JSON, nullable=False),
    Column("at", Double, nullable=False),
    Index(None, "owner", "at"),
)

custom_losses = Table(
    "custom_losses",
    metadata,
    Column("loss_id", String, primary_key=True, comment="a function of session and number"),
    Column("owner", String, nullable=False),
    Column("session_id", String, ForeignKey("sessions.session_id"), nullable=False),
    Column("name", String, nullable=False),
    Column("body", LargeBinary, nullable=False, comment="engines.graphs.CustomLoss; empty when refused"),
    Column("error", String, comment="why it was refused"),
    Column("created_at", Double, nullable=False),
    Index(None, "session_id"),
)

leases = Table(
    "leases",
    metadata,
    Column("engine", String, primary_key=True),
    Column("holder", String, nullable=False, comment="the gateway process that dispatches for this engine"),
    Column("epoch", BigInteger, nullable=False, comment="raised at each start of the engine"),
    Column("expires_at", Double, nullable=False),
    Column("state", String, comment="what the engine does there, as its supervisor says"),
    Column("problem", String, comment="why it is not well"),
)

replicas = Table(
    "replicas",
    metadata,
    Column(
        "engine", String, primary_key=True, comment="its name in the settings, which is its first replica's"
    ),
    Column("wanted", Integer, nullable=False, comment="how many there are to be"),
    Column("smallest", Integer, comment="bounds that an admin has set; none: those of the settings"),
    Column("largest", Integer),
)

engine_facts = Table(
    "engine_facts",
    metadata,
    Column("engine", String, primary_key=True),
    Column("epoch", BigInteger, nullable=False, comment="of the start that has told them"),
    Column("info", LargeBinary, nullable=False, comment="engines.interface.EngineInfo, msgpack"),
    Column("tokenizer_files", LargeBinary, nullable=False, comment="contents by name, msgpack"),
)

gateways = Table(
    "gateways",
    metadata,
    Column("holder", String, primary_key=True, comment="a gateway process, as leases name it"),
    Column("url", String, nullable=False, comment="where other gateways reach it; empty: nowhere"),
    Column("seen_at", Double, nullable=False),
)

duties = Table(
    "duties",
    metadata,
    Column("name", String, primary_key=True),
    Column("holder", String, comment="the gateway process that performs it now"),
    Column("expires_at", Double, nullable=False, comment="of the holder's lease"),
    Column("last_run_at", Double, comment="when it was last finished, or failed"),
    Column("last_seconds", Double),
    Column("last_done", BigInteger, comment="things removed, ended or freed then"),
    Column("last_error", String, comment="of the newest failure, however long ago"),
    Column("failed_at", Double),
    Column("runs", BigInteger, nullable=False),
    Column("failures", BigInteger, nullable=False),
    Column("done", BigInteger, nullable=False),
)
