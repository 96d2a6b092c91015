"""Fills a database with the traces of many calls, as some weeks of training and sampling leave them behind."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Table, insert, literal, literal_column, select

from gateway.store import schema
from gateway.store.database import Database

PER_LOG = 1000
"""Calls of a run, or samples of a sampler."""
DAYS = 40.0
"""Over which the calls are spread, evenly."""

_RANDOM = {
    "sqlite": "randomblob({0})",
    "postgresql": "decode(substr(repeat(md5(random()::text), {0} / 16 + 1), 1, 2 * {0}), 'hex')",
}
# Every third log is a run's: three passes and a step over and over, one save in a hundred. The others are samplers'.
_RUN = f"(i / {PER_LOG}) % 3 = 0"
_LOG = f"'s' || (i / {PER_LOG})"
_SEQ = f"(i % {PER_LOG})"
_ID = f"{_LOG} || CASE WHEN {_RUN} THEN ':train:0:' ELSE ':sample:0:' END || {_SEQ}"
_KIND = (
    f"CASE WHEN NOT ({_RUN}) THEN 'sample' WHEN {_SEQ} = 0 THEN 'create_run' WHEN {_SEQ} % 100 = 99 THEN "
    f"'save_weights' WHEN {_SEQ} % 4 = 0 THEN 'optim_step' ELSE 'forward_backward' END"
)

Columns = dict[str, str]
"""Names, and expressions of the row's number `i` and of `at`, its time."""

SESSIONS: Columns = {
    "session_id": "'s' || i",
    "owner": "'owner' || (i % 20)",
    "user_metadata": "'{}'",
    "tags": "'[]'",
    "sdk_version": "'0.38.0'",
    "created_at": "at",
    "heartbeat_at": "at",
    "finished_at": "at + 60",
    "finish_reason": "'success'",
}
_OF_SESSION: Columns = {
    "owner": "'owner' || (i % 20)",
    "session_id": "'s' || i",
    "engine": "'fake'",
    "base_model": "'fake/model'",
    "created_at": "at",
}
RUNS: Columns = {
    **_OF_SESSION,
    "run_id": "'s' || i || ':train:0'",
    "model_seq_id": "0",
    "lora": """'{"rank": 4}'""",
    "optimizer": "'adamw'",
    "user_metadata": "'{}'",
    "status": "CASE WHEN i % 2 = 0 THEN 'unloaded' ELSE 'active' END",
    "next_seq": f"{PER_LOG}",
    "step": f"{PER_LOG} / 4",
    "pending_loss": "0",
    "pending_tokens": "0",
    "pending_seconds": "0",
    "last_request_at": "at",
}
SAMPLERS: Columns = {**_OF_SESSION, "sampler_id": "'s' || i || ':sample:0'", "folder": "'checkpoints/' || i"}
FUTURES: Columns = {
    "request_id": _ID,
    "owner": f"'owner' || ((i / {PER_LOG}) % 20)",
    "engine": "'fake'",
    "kind": _KIND,
    "run_id": f"CASE WHEN {_RUN} THEN {_LOG} || ':train:0' END",
    "sampler_id": f"CASE WHEN NOT ({_RUN}) THEN {_LOG} || ':sample:0' END",
    "seq_id": _SEQ,
    "status": "'done'",
    "epoch": "1",
    "attempts": "1",
    "deaths": "0",
    "context": "'{}'",
    "folder": f"CASE WHEN {_RUN} AND {_SEQ} % 100 = 99 THEN 'checkpoints/' || i END",
    "created_at": "at",
    "started_at": "at + 0.01",
    "finished_at": "at + 0.02",
}
INPUTS: Columns = {"request_id": _ID, "body": "random of 500"}
RESULTS: Columns = {"request_id": _ID, "body": "random of 300", "stored_at": "at + 0.02"}


async def fill(database: Database, futures: int) -> None:
    """So many finished futures, with the sessions, runs and samplers that they belong to, inputs and results."""
    logs = max(1, futures // PER_LOG)
    for table, columns, count, condition in (
        (schema.sessions, SESSIONS, logs, "true"),
        (schema.runs, RUNS, logs, "i % 3 = 0"),
        (schema.samplers, SAMPLERS, logs, "i % 3 <> 0"),
        (schema.futures, FUTURES, futures, "true"),
        (schema.inputs, INPUTS, futures, f"{_RUN} AND {_SEQ} % 100 <> 99"),
        (schema.results, RESULTS, futures, "true"),
    ):
        await database.alone(lambda c, t=table, s=columns, n=count, w=condition: _insert(c, t, s, n, w))  # type: ignore[misc]
    await database.alone(lambda connection: connection.exec_driver_sql("ANALYZE"))


def _insert(connection: Connection, table: Table, columns: Columns, count: int, condition: str) -> None:
    """One statement for all rows: the database makes them up by itself."""
    random, span = _RANDOM[connection.dialect.name], DAYS * 86400
    at = f"({time.time() - span:.1f} + {span / count} * i)"
    expressions = [
        random.format(text.removeprefix("random of "))
        if text.startswith("random of ")
        else text.replace("at + ", f"{at} + ")
        if text != "at"
        else at
        for text in columns.values()
    ]
    numbers = select(literal(0).label("i")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.i + 1).where(numbers.c.i + 1 < count))
    rows: Any = (
        select(*map(literal_column, expressions)).select_from(numbers).where(literal_column(condition))
    )
    connection.execute(insert(table).from_select(list(columns), rows))
