"""How work reaches a database: over asyncpg on Postgres, in a worker thread on SQLite.

On SQLite a whole transaction runs in one hop to the thread: through an asyncio driver every statement would be several
(measured in docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

T = TypeVar("T")


class Driver(Protocol):
    """How work reaches the database: `work` gets a connection, in a transaction of its own when it writes."""

    async def read(self, work: Callable[[Connection], T]) -> T: ...

    async def write(
        self, work: Callable[[Connection], T], *, flushed: bool, one_statement: bool = False
    ) -> T:
        """`flushed`: the commit must survive a power loss, not only the death of a process. `one_statement`: the work
        is just that where the database can do it."""

    async def alone(self, work: Callable[[Connection], T]) -> T:
        """A flushed transaction that may take as long as it needs."""

    async def close(self) -> None: ...

    def engines(self) -> list[Engine]: ...


DISCREET: dict[str, Any] = {"hide_parameters": True}
"""Of every engine: the error of a statement goes to the log, and what it was to write is somebody's data."""

_POSTGRES = {
    "timeout": 15,
    "command_timeout": 120,
    "server_settings": {"synchronous_commit": "on", "idle_in_transaction_session_timeout": "5000"},
}
"""A silent server is an error within these seconds; a commit is on disk whatever the role's default is; the locks of a
process that stands still in the middle of a transaction keep another gateway's transaction waiting for 5 s at most."""


_UNHURRIED = {"timeout": 15, "server_settings": {"synchronous_commit": "on"}}
"""Of a connection whose statements may take hours: to rebuild a large table."""

_PING_AFTER_S = 1.0
"""Seconds after which the writer asks whether its connection is still there; to ask before each transaction costs more
than the transaction."""


class PostgresDriver:
    def __init__(self, url: str, readers: int) -> None:
        self._readers = create_async_engine(
            url, pool_size=readers, pool_pre_ping=True, connect_args=_POSTGRES, **DISCREET
        )
        self._writers = create_async_engine(
            url, pool_size=1, max_overflow=0, connect_args=_POSTGRES, **DISCREET
        )
        self._url = url
        self._writer: AsyncConnection | None = None
        self._written_at = float("-inf")

    async def read(self, work: Callable[[Connection], T]) -> T:
        async with self._readers.connect() as connection:
            return await connection.run_sync(work)

    async def write(
        self, work: Callable[[Connection], T], *, flushed: bool, one_statement: bool = False
    ) -> T:
        # Always flushed: a server that crashes alone must not forget what this process remembers as settled.
        if self._writer is None:
            self._writer = await self._writers.connect()
        elif time.monotonic() - self._written_at > _PING_AFTER_S:
            await self._writer.run_sync(_ping)
        perform = _in_own_transaction if one_statement else _in_transaction
        answer = await self._writer.run_sync(perform, work)
        self._written_at = time.monotonic()
        return answer

    async def alone(self, work: Callable[[Connection], T]) -> T:
        engine = create_async_engine(self._url, connect_args=_UNHURRIED, **DISCREET)
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(work)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        if self._writer is not None:
            await self._writer.close()
        await self._readers.dispose()
        await self._writers.dispose()

    def engines(self) -> list[Engine]:
        return [self._readers.sync_engine, self._writers.sync_engine]


class SqliteDriver:
    def __init__(self, url: str, synchronous: str, readers: int) -> None:
        self._engine = create_engine(
            make_url(url).set(drivername="sqlite+pysqlite"), pool_size=readers + 1, **DISCREET
        )
        _configure_sqlite(self._engine, synchronous)
        self._synchronous = synchronous
        self._reading = ThreadPoolExecutor(readers, "sqlite-read")
        self._writing = ThreadPoolExecutor(1, "sqlite-write")
        self._writer: Connection | None = None

    async def read(self, work: Callable[[Connection], T]) -> T:
        def in_thread() -> T:
            with self._engine.connect() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._reading, in_thread)

    async def write(
        self, work: Callable[[Connection], T], *, flushed: bool, one_statement: bool = False
    ) -> T:
        # Here it is several statements in any case: they cost little in one process.
        level = self._synchronous if flushed else "NORMAL"

        def in_thread() -> T:
            if self._writer is None:
                self._writer = self._engine.connect().execution_options(writes=True)
            _set_synchronous(self._writer, level)
            return _in_transaction(self._writer, work)

        return await asyncio.get_running_loop().run_in_executor(self._writing, in_thread)

    async def alone(self, work: Callable[[Connection], T]) -> T:
        return await self.write(work, flushed=True)

    async def close(self) -> None:
        if self._writer is not None:
            await asyncio.get_running_loop().run_in_executor(self._writing, self._writer.close)
        self._writing.shutdown()
        self._reading.shutdown()
        self._engine.dispose()

    def engines(self) -> list[Engine]:
        return [self._engine]


def _in_transaction(connection: Connection, work: Callable[[Connection], T]) -> T:
    """A writer keeps its connection; one that has been cut is made anew by the next transaction."""
    with connection.begin():
        return work(connection)


def _in_own_transaction(connection: Connection, work: Callable[[Connection], T]) -> T:
    """The same without the BEGIN and COMMIT that the driver sends by itself, for work that is one statement."""
    driver: Any = connection.connection.dbapi_connection
    driver.autocommit = True
    try:
        return _in_transaction(connection, work)
    finally:
        driver.autocommit = False


def _ping(connection: Connection) -> None:
    """Find out whether the connection was cut while nobody used it."""
    with contextlib.suppress(DBAPIError):  # if it was not cut, the next statement fails as well and is told
        connection.exec_driver_sql("SELECT 1")
    connection.rollback()


def _configure_sqlite(engine: Engine, synchronous: str) -> None:
    """WAL, so that readers and the writer do not wait for each other; a writer takes its lock at once."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            "busy_timeout=30000",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_synchronous(connection: Connection, level: str) -> None:
    """How far the next commit of this connection goes; SQLite takes it outside a transaction only."""
    raw: Any = connection.connection.dbapi_connection
    raw.execute(f"PRAGMA synchronous={level}")
