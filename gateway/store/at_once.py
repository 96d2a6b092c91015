"""Accepting and settling on PostgreSQL, each in one statement.

Each statement that goes to a server costs this process 0.1 to 0.2 ms, whatever it does: it is sent, another process
wakes, its answer is awaited. A future took eleven, BEGIN and COMMIT among them, and now takes two: a statement with
several changing parts (data-modifying CTEs) does what the statements of `gateway.store.futures` and
`gateway.store.settling` do one after the other, and one statement is a transaction by itself.

All parts of such a statement see the tables as they were before it, and may change a row once. So it settles one
operation of a run at most, and what a later part needs of an earlier one is what that returns. Rows come as one array
for each column: the text of a statement is the same for any number of them, and so is its plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Connection
from sqlalchemy.dialects import postgresql

from gateway.store import schema
from gateway.store.records import Future, RunStatus
from gateway.store.usage import COUNTERS

_DIALECT: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
_FUTURE = [column.name for column in schema.futures.columns]
_JSON = frozenset({"context"})
_OPEN = schema.OPEN.text


def _rows(name: str, types: dict[str, str], first: int = 1) -> str:
    """Arrays as the columns of rows, as a part of a statement called `name`; `first` numbers its parameters."""
    arrays = ", ".join(f"${first + at}::{kind}[]" for at, kind in enumerate(types.values()))
    return f"{name} AS (SELECT * FROM unnest({arrays}) AS {name} ({', '.join(types)}))"  # noqa: S608 - own names


def _types(columns: Sequence[Column[Any]]) -> dict[str, str]:
    """How PostgreSQL calls the columns' types, by the columns' names."""
    return {column.name: str(column.type.compile(dialect=_DIALECT)) for column in columns}


_ACCEPT = f"""
WITH {_rows("given", {**_types(list(schema.futures.columns)), "body": "BYTEA"})},
new AS (
    INSERT INTO futures ({", ".join(_FUTURE)}) SELECT {", ".join(_FUTURE)} FROM given
    ON CONFLICT DO NOTHING RETURNING request_id
),
kept AS (
    INSERT INTO inputs (request_id, body)
    SELECT request_id, body FROM given JOIN new USING (request_id) WHERE body IS NOT NULL
    ON CONFLICT DO NOTHING
)
SELECT request_id FROM new
"""  # noqa: S608 - names of the schema


def insert_futures(connection: Connection, accepted: Sequence[tuple[Future, bytes | None]]) -> set[str]:
    """Store futures, each once in here, with the inputs that are to be kept; the ids of those that were new."""
    rows = [[*(_value(future, name) for name in _FUTURE), body] for future, body in accepted]
    return set(connection.exec_driver_sql(_ACCEPT, tuple(_columns(rows))).scalars())


def _value(future: Future, column: str) -> Any:
    value = getattr(future, column)
    return json.dumps(value) if column in _JSON else value


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


_OUTCOME = {
    "request_id": "VARCHAR",
    "run_id": "VARCHAR",
    "seq_id": "BIGINT",
    # the fence
    "engine": "VARCHAR",
    "epoch": "BIGINT",
    "newest_claim": "BIGINT",
    "fence": "BIGINT",
    # what becomes of the future
    "started_at": "FLOAT",
    "status": "VARCHAR",
    "error": "VARCHAR",
    "error_category": "VARCHAR",
    "error_id": "VARCHAR",
    "result_digest": "BYTEA",
    "measure": "FLOAT",
    "body": "BYTEA",
    "spent": "BOOLEAN",
    # what becomes of its run
    "created_as": "VARCHAR",
    "stepped": "BOOLEAN",
    "loss": "FLOAT",
    "tokens": "BIGINT",
    "seconds": "FLOAT",
    "grad_norm": "FLOAT",
    "learning_rate": "FLOAT",
    # what its owner has used
    "owner": "VARCHAR",
    "session_id": "VARCHAR",
    "base_model": "VARCHAR",
    **dict.fromkeys(COUNTERS, "BIGINT"),
}
_AT, _HOUR = f"${len(_OUTCOME) + 1}::FLOAT", f"${len(_OUTCOME) + 2}::BIGINT"
_COUNTERS = ", ".join(COUNTERS)

# The keys stand in each part as arrays too: a plan is made before it is known how many rows there are, and must find
# them by an index whatever it guesses.
_KEYS, _RUNS = "ANY ($1::VARCHAR[])", "ANY ($2::VARCHAR[])"

_SETTLE = f"""
WITH {_rows("given", _OUTCOME)},
settled AS (
    UPDATE futures AS f SET
        status = g.status,
        epoch = g.epoch,
        attempts = f.attempts + CASE WHEN f.epoch IS NOT DISTINCT FROM g.epoch THEN 0 ELSE 1 END,
        started_at = CASE WHEN f.epoch IS NOT DISTINCT FROM g.epoch THEN f.started_at ELSE g.started_at END,
        error = g.error,
        error_category = g.error_category,
        error_id = g.error_id,
        result_digest = g.result_digest,
        measure = g.measure,
        finished_at = {_AT}
    FROM given AS g
    WHERE f.request_id = g.request_id AND f.request_id = {_KEYS}
        AND f.{_OPEN}
        AND f.engine = g.engine
        AND coalesce(f.epoch, 0) <= g.newest_claim
        AND (g.fence IS NULL
            OR coalesce((SELECT epoch FROM leases WHERE leases.engine = f.engine), 0) <= g.fence)
        AND NOT EXISTS (
            SELECT 1 FROM runs AS r JOIN futures AS b ON b.run_id = r.run_id
            WHERE r.run_id = f.run_id AND b.seq_id >= r.next_seq AND b.seq_id < f.seq_id AND b.{_OPEN}
        )
    RETURNING f.request_id
),
kept AS (
    INSERT INTO results (request_id, body, stored_at)
    SELECT request_id, body, {_AT} FROM given JOIN settled USING (request_id) WHERE body IS NOT NULL
    ON CONFLICT DO NOTHING
),
spent AS (
    DELETE FROM inputs AS i USING given AS g JOIN settled USING (request_id)
    WHERE i.request_id = g.request_id AND i.request_id = {_KEYS} AND g.spent
),
step AS (
    INSERT INTO steps (run_id, step, seq_id, loss, tokens, grad_norm, learning_rate, seconds, finished_at)
    SELECT r.run_id, r.step + 1, g.seq_id, r.pending_loss, r.pending_tokens,
        g.grad_norm, g.learning_rate, r.pending_seconds + g.seconds, {_AT}
    FROM runs AS r JOIN given AS g USING (run_id) JOIN settled USING (request_id)
    WHERE r.run_id = {_RUNS} AND g.stepped
),
moved AS (
    UPDATE runs AS r SET
        step = r.step + CASE WHEN g.stepped THEN 1 ELSE 0 END,
        pending_loss = CASE WHEN g.stepped THEN 0 ELSE r.pending_loss + g.loss END,
        pending_tokens = CASE WHEN g.stepped THEN 0 ELSE r.pending_tokens + g.tokens END,
        pending_seconds = CASE WHEN g.stepped THEN 0 ELSE r.pending_seconds + g.seconds END,
        next_seq = greatest(r.next_seq, g.seq_id + 1),
        status = CASE WHEN r.status = '{RunStatus.CREATING}' THEN g.created_as ELSE r.status END,
        last_request_at = {_AT}
    FROM given AS g JOIN settled USING (request_id)
    WHERE r.run_id = g.run_id AND r.run_id = {_RUNS}
),
counted AS (
    INSERT INTO usage (bucket, owner, session_id, base_model, {_COUNTERS})
    SELECT {_HOUR}, g.owner, g.session_id, g.base_model, {", ".join(f"sum(g.{name})" for name in COUNTERS)}
    FROM given AS g JOIN settled USING (request_id)
    WHERE g.owner IS NOT NULL
    GROUP BY g.owner, g.session_id, g.base_model
    ORDER BY g.owner, g.session_id, g.base_model
    ON CONFLICT (bucket, owner, session_id, base_model)
    DO UPDATE SET {", ".join(f"{name} = usage.{name} + excluded.{name}" for name in COUNTERS)}
)
SELECT request_id FROM settled
"""  # noqa: S608 - names of the schema


def settle(connection: Connection, outcomes: Sequence[Mapping[str, Any]], at: float, hour: int) -> set[str]:
    """Store outcomes, no two of one run, each with the values that `_OUTCOME` names; the ids of the futures that were
    their sender's to settle. `at` is now, `hour` the first second of the hour that usage is counted in."""
    rows = [[outcome.get(name) for name in _OUTCOME] for outcome in outcomes]
    return set(connection.exec_driver_sql(_SETTLE, (*_columns(rows), at, hour)).scalars())
