"""Connections, and the one path by which rows are written: a group commit.

Writers hand in an operation and an argument and wait; whatever has gathered while the last transaction was being
committed goes into the next one, neighbours with the same operation in one call. One request costs one commit when it
is alone and a share of one under load. No other code commits.

Operations are plain functions of a SQLAlchemy connection, which `gateway.store.drivers` makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Row, delete, func, select
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.sql import Executable

from gateway.errors import StoreUnavailable
from gateway.store import schema
from gateway.store.dialect import insert_or_ignore
from gateway.store.drivers import Driver, PostgresDriver, SqliteDriver
from gateway.store.notices import CHANNEL, News, Notice, encoded
from gateway.store.outages import StoreConflict, StoreCut, translated_errors
from gateway.troubles import Trouble

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
_AGAIN_S = (0.0, 0.1, 0.4, 1.0)
"""Seconds after which what may be repeated is tried again when the connection was cut: as soon as a proxy or a quick
restart of a server takes. Whatever else wants to be written waits meanwhile."""
_TRIAL_BYTES = 1 << 18
_BEHIND_S = 0.02
"""Seconds that a write nobody waits for may wait for another one's transaction."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Write(Generic[A, R]):
    operation: WriteMany[A, R]
    argument: A
    outcome: asyncio.Future[R]
    then: Callable[[R], None] | None
    recomputable: bool
    notice: Notice | None = None
    behind: bool = False
    again: WriteMany[A, R] | None = None
    tries: int = 0

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
        self.storing = Trouble(log, "the database stores again what it is given", logging.ERROR)
        """Whether what is written is stored, as far as is known."""
        self._reading = Trouble(log, "the database answers again", logging.ERROR)
        self._driver: Driver
        if make_url(url).get_backend_name() == "sqlite":
            self._driver = SqliteDriver(url, sqlite_synchronous, readers)
        else:
            self._driver = PostgresDriver(url, readers)
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
        try:
            return await self._read(work)
        except StoreCut:  # in the middle of it: another connection may be whole
            return await self._read(work)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        with translated_errors(self._reading):
            answer = await self._driver.read(work)
        self._reading.succeeded()
        return answer

    async def alone(self, work: Callable[[Connection], T]) -> T:
        """A transaction outside the group commit, for migrations."""
        with translated_errors(self.storing):
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
        again: WriteMany[A, R] | None = None,
    ) -> asyncio.Future[R]:
        """Have `operation` done for `argument` in the next transaction; the answer comes after the commit.

        Writes take effect in the order of these calls. `then` is called with the answer right after the commit,
        whether or not the caller still waits. What is `recomputable` from earlier writes survives the death of any
        process; the embedded database may forget the newest of it in a power loss, if nothing else was written since.
        Other gateways are told the `notice` by the same commit. Where `again` is given, a write whose connection was
        cut is tried a few times more, in its place in the order: it does the same as `operation`, and answers the same
        whether or not that has been committed.
        """
        outcome: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._pending.append(_Write(operation, argument, outcome, then, recomputable, notice, again=again))
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
        await self.write(_nothing, None, recomputable=True, again=_nothing)

    async def try_to_store(self) -> None:
        """Store something and remove it: if that succeeds, `storing` knows of no problem any more."""
        with contextlib.suppress(StoreUnavailable):
            key = f"trial of {id(self)}"
            await self.write(_store_trial, key)
            await self.write(_remove_trial, key)
            self.storing.succeeded(surely=True)

    def write_behind(
        self, operation: WriteMany[A, R], argument: A, *, again: WriteMany[A, R] | None = None
    ) -> asyncio.Future[R]:
        """A recomputable write that nobody waits for: it goes along with the next transaction, which comes soon. One
        that is cancelled before that is not done."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        self._pending.append(
            _Write(operation, argument, outcome, None, recomputable=True, behind=True, again=again)
        )
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
        except StoreCut as error:
            await self._repeat(group, error)
            return
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

    async def _repeat(self, group: list[_Write[Any, Any]], error: StoreCut) -> None:
        """Nobody knows whether the transaction was committed. What may be repeated is, the rest is refused."""
        repeated = [write for write in group if write.again is not None and write.tries < len(_AGAIN_S)]
        _refuse([write for write in group if write not in repeated], error)
        if not repeated:
            return
        await asyncio.sleep(_AGAIN_S[max(write.tries for write in repeated)])
        for write in repeated:
            write.operation = write.again or write.operation
            write.tries += 1
        await self._commit_group(repeated)

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
                with translated_errors(self.storing):
                    answers = await self._driver.write(
                        lambda connection: _perform(connection, group, payload),
                        flushed=flushed,
                        one_statement=one_statement,
                    )
                self.storing.succeeded()
                return answers
            except StoreConflict:
                if not tries_left:
                    raise


def _nothing(connection: Connection, wanted: list[None]) -> list[None]:
    return wanted


def _store_trial(connection: Connection, keys: list[str]) -> list[None]:
    """As an input; two transactions, for what is removed in the same one need not be written at all."""
    for key in keys:
        row = {"request_id": key, "body": os.urandom(_TRIAL_BYTES)}
        connection.execute(insert_or_ignore(connection, schema.inputs), row)
    return [None] * len(keys)


def _remove_trial(connection: Connection, keys: list[str]) -> list[None]:
    connection.execute(delete(schema.inputs).where(schema.inputs.c.request_id.in_(keys)))
    return [None] * len(keys)


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
        elif not isinstance(error, StoreUnavailable):  # which has been told
            log.error("a write failed after its caller had left: %s", error)
