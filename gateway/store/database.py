"""Connections, and the one path by which rows are written: a group commit.

Writers hand in an operation and an argument and wait; whatever has gathered while the last transaction was being
committed goes into the next one, neighbours with the same operation in one call. One request costs one commit when it
is alone and a share of one under load. No other code commits.

Operations are plain functions of a SQLAlchemy connection. On Postgres they run over asyncpg. On SQLite a whole
transaction runs in one hop to a worker thread: through an asyncio driver every statement would be several (measured in
docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import Connection, Row, create_engine, event, func, select
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.sql import Executable

from gateway.errors import StoreUnavailable
from gateway.store.notices import CHANNEL, News, Notice, encoded
from gateway.store.outages import StoreConflict, translated_errors

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")

WriteMany = Callable[[Connection, list[A]], list[R]]
"""A write operation: takes the arguments of several callers, answers each in order."""


@dataclass(frozen=True, slots=True, eq=False)
class AtOnce(Generic[A, R]):
    """A write operation that PostgreSQL does in one statement where `fits` says so: such a statement is a transaction
    by itself, and need not travel between a BEGIN and a COMMIT."""

    perform: Callable[[Connection, list[A]], list[R]]
    fits: Callable[[Sequence[A]], bool]

    def __call__(self, connection: Connection, arguments: list[A]) -> list[R]:
        return self.perform(connection, arguments)


_LARGEST_GROUP = 512
_TRIES = 4
"""Of a transaction that another one has been in the way of."""
_BEHIND_S = 0.02
"""Seconds that a write nobody waits for may wait for another one's transaction."""

log = logging.getLogger(__name__)


class _Driver(Protocol):
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


class _PostgresDriver:
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


class _SqliteDriver:
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


@dataclass(slots=True)
class _Write(Generic[A, R]):
    operation: WriteMany[A, R]
    argument: A
    outcome: asyncio.Future[R]
    then: Callable[[R], None] | None
    recomputable: bool
    notice: Notice | None = None
    behind: bool = False

    @property
    def needless(self) -> bool:
        return self.behind and self.outcome.cancelled()


class Database:
    """Readers and the single writer of this process.

    `url` is a SQLAlchemy URL, sqlite:///file or postgresql+asyncpg://... `sqlite_synchronous` is FULL (a commit
    survives a power loss) or NORMAL (it survives any crash of a process).
    """

    def __init__(self, url: str, *, sqlite_synchronous: str = "FULL", readers: int = 4) -> None:
        self.payload_of: Callable[[Sequence[Notice]], str] | None = None
        """How other gateways are told of what a transaction does; None: there are none."""
        self._driver: _Driver
        if make_url(url).get_backend_name() == "sqlite":
            self._driver = _SqliteDriver(url, sqlite_synchronous, readers)
        else:
            self._driver = _PostgresDriver(url, readers)
        self._pending: list[_Write[Any, Any]] = []
        self._wake = asyncio.Event()
        self._wake_later: asyncio.TimerHandle | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def engines(self) -> list[Engine]:
        """What sends the statements, for whoever listens to them."""
        return self._driver.engines()

    def start(self) -> None:
        """Start the writer; call it in the running loop."""
        self._task = asyncio.create_task(self._write_forever(), name="store-writer")

    async def close(self) -> None:
        """Commit what has been handed in, then close every connection."""
        if self._task is not None:
            self._closing = True
            self._wake.set()
            await self._task
        await self._driver.close()

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` makes of a connection for reading. Raises StoreUnavailable when the database does not answer."""
        with translated_errors():
            return await self._driver.read(work)

    async def alone(self, work: Callable[[Connection], T]) -> T:
        """A transaction outside the group commit, for migrations."""
        with translated_errors():
            return await self._driver.alone(work)

    async def rows(self, query: Executable) -> Sequence[Row[Any]]:
        """All rows of a query."""
        return await self.read(lambda connection: connection.execute(query).all())

    async def first(self, query: Executable) -> Row[Any] | None:
        """The first row of a query, if there is one."""
        return await self.read(lambda connection: connection.execute(query).first())

    def write(
        self,
        operation: WriteMany[A, R],
        argument: A,
        then: Callable[[R], None] | None = None,
        *,
        recomputable: bool = False,
        notice: Notice | None = None,
    ) -> asyncio.Future[R]:
        """Have `operation` done for `argument` in the next transaction; the answer comes after the commit.

        Writes take effect in the order of these calls. `then` is called with the answer right after the commit,
        whether or not the caller still waits. What is `recomputable` from earlier writes survives the death of any
        process; the embedded database may forget the newest of it in a power loss, if nothing else was written since.
        Other gateways are told the `notice` by the same commit.
        """
        outcome: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._pending.append(_Write(operation, argument, outcome, then, recomputable, notice))
        self._wake.set()
        return outcome

    async def tell_all(self, news: News) -> None:
        """Tell other gateways something, whether any are known or not."""
        await self.write(_notify, encoded(news), recomputable=True)

    async def tell(self, notice: Notice) -> None:
        """Tell other gateways something, when everything that was handed in before has been committed."""
        await self.write(_nothing, None, recomputable=True, notice=notice)

    async def barrier(self) -> None:
        """Returns when everything that was handed in before has been committed, or refused."""
        await self.write(_nothing, None, recomputable=True)

    def write_behind(self, operation: WriteMany[A, R], argument: A) -> asyncio.Future[R]:
        """A recomputable write that nobody waits for: it goes along with the next transaction, which comes soon. One
        that is cancelled before that is not done."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        self._pending.append(_Write(operation, argument, outcome, None, recomputable=True, behind=True))
        if self._wake_later is None:
            self._wake_later = loop.call_later(_BEHIND_S, self._wake.set)
        return outcome

    async def _write_forever(self) -> None:
        while self._pending or not self._closing:
            await self._wake.wait()
            self._wake.clear()
            if self._wake_later is not None:
                self._wake_later.cancel()
                self._wake_later = None
            while self._pending:
                group, self._pending = self._pending[:_LARGEST_GROUP], self._pending[_LARGEST_GROUP:]
                if group := [write for write in group if not write.needless]:
                    await self._commit_group(group)

    async def _commit_group(self, group: list[_Write[Any, Any]]) -> None:
        """One transaction for all; if anything in it fails, each alone, so that only the culprit is told."""
        try:
            answers = await self._committed(group)
        except StoreUnavailable as error:
            _refuse(group, error)
            return
        except Exception as error:  # boundary: the error goes to the caller who waits for this write
            if len(group) == 1:
                _refuse(group, error)
            else:
                for write in group:
                    await self._commit_group([write])
            return
        for write, answer in zip(group, answers, strict=True):
            if write.then is not None:
                _tell(write.then, answer)
            if not write.outcome.done():
                write.outcome.set_result(answer)

    async def _committed(self, group: list[_Write[Any, Any]]) -> list[Any]:
        """One transaction, repeated when it was in the way of another gateway's."""
        flushed = not all(write.recomputable for write in group)
        notices = [write.notice for write in group if write.notice is not None]
        payload = self.payload_of(notices) if notices and self.payload_of is not None else None
        one_statement = payload is None and _fits_one_statement(group)
        tries_left = _TRIES
        while True:
            tries_left -= 1
            try:
                with translated_errors():
                    return await self._driver.write(
                        lambda connection: _perform(connection, group, payload),
                        flushed=flushed,
                        one_statement=one_statement,
                    )
            except StoreConflict:
                if not tries_left:
                    raise


def _nothing(connection: Connection, wanted: list[None]) -> list[None]:
    return wanted


def _notify(connection: Connection, payloads: list[str]) -> list[None]:
    for payload in payloads:
        connection.execute(select(func.pg_notify(CHANNEL, payload)))
    return [None] * len(payloads)


def _fits_one_statement(group: list[_Write[Any, Any]]) -> bool:
    operation = group[0].operation
    if not isinstance(operation, AtOnce) or any(write.operation is not operation for write in group):
        return False
    return operation.fits([write.argument for write in group])


def _perform(connection: Connection, group: list[_Write[Any, Any]], payload: str | None) -> list[Any]:
    answers: list[Any] = []
    for operation, writes in groupby(group, key=lambda write: write.operation):
        answers += operation(connection, [write.argument for write in writes])
    if payload is not None:
        _notify(connection, [payload])
    return answers


def _tell(then: Callable[[Any], None], answer: Any) -> None:
    try:
        then(answer)
    except Exception:  # boundary: a bug in a listener must not end the only writer
        log.exception("a listener of the store failed")


def _refuse(group: list[_Write[Any, Any]], error: Exception) -> None:
    for write in group:
        if not write.outcome.done():
            write.outcome.set_exception(error)
        else:
            log.error("a write failed after its caller had left: %s", error)


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
