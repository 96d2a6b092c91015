"""A store on SQLite and on a real PostgreSQL: every test in this folder runs on both."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.migrate import upgrade
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.records import Future, Run, Session

_COUNTER = itertools.count()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'test.db'}", sqlite_synchronous="NORMAL")
        await upgrade(database)
    else:
        database = Database(request.getfixturevalue("pg_url"))
    store = Store(database)
    store.start()
    yield store
    await store.close()


def a_session(**changes: Any) -> Session:
    values: dict[str, Any] = {
        "session_id": f"s{next(_COUNTER)}",
        "owner": "alice",
        "idempotency_key": None,
        "user_metadata": {},
        "tags": [],
        "sdk_version": "0.38.0",
        "project_id": None,
        "display_name": None,
        "created_at": time.time(),
        "heartbeat_at": time.time(),
    }
    return Session(**{**values, **changes})


def a_run(session: Session, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "run_id": f"{session.session_id}:train:0",
        "owner": session.owner,
        "session_id": session.session_id,
        "model_seq_id": 0,
        "engine": "e",
        "base_model": "m",
        "lora": {"rank": 8},
        "optimizer": "adamw",
        "origin_path": None,
        "origin_folder": None,
        "user_metadata": {},
        "created_at": time.time(),
        "last_request_at": time.time(),
    }
    return Run(**{**values, **changes})


def an_operation(run: Run, seq_id: int, kind: str = "forward_backward", **changes: Any) -> Future:
    values: dict[str, Any] = {
        "request_id": f"{run.run_id}:{seq_id}",
        "owner": run.owner,
        "engine": run.engine,
        "kind": kind,
        "seq_id": seq_id,
        "created_at": time.time(),
        "run_id": run.run_id,
    }
    return Future(**{**values, **changes})
