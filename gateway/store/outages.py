"""Which errors of a database speak of the server or the disk, not of the statement: decided by their codes.

Messages are not looked at: they are translated to the server's language and change with its version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.errors import StoreUnavailable
from gateway.troubles import Trouble

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN_S = 0.5

_CONFLICTS = ("40001", "40P01")
"""Serialization failure and deadlock: two transactions in each other's way."""

_SQLSTATES = (
    "08",  # the connection
    "28",  # the server does not take this role any more
    "3D",  # the database is not there
    "53",  # disk, memory or connections are used up
    "57P",  # shutting down, starting up, recovering
    "57014",  # the statement took longer than the server allows
    "58",  # the operating system refused
    "25P03",  # this process was silent in the middle of a transaction, for too long
    "25006",  # a standby, or a disk that has been made read-only
    "55P03",
    *_CONFLICTS,
)
"""How the SQLSTATE of an outage begins: https://www.postgresql.org/docs/current/errcodes-appendix.html"""

_CUT = ("08", "57P", "25P03")
"""Of these, those after which there is no connection any more, or not yet."""

_SQLITE_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_PERM,
    }
)
"""Primary result codes: https://www.sqlite.org/rescode.html"""


class StoreConflict(StoreUnavailable):
    """Another transaction, of another gateway, was in the way of this one; repeating it helps at once."""


class StoreCut(StoreUnavailable):
    """The server is not to be reached, or was cut off in the middle of a transaction, which may have been committed."""


@contextlib.contextmanager
def translated_errors(trouble: Trouble) -> Iterator[None]:
    """The one seam at which the driver's errors become ours; outages are told to the `trouble`. A broken statement
    stays what it is: a bug."""
    try:
        yield
    except (
        Exception
    ) as error:  # boundary: the driver's own errors, while it connects, are of no class we may import
        if not is_outage(error):
            raise
        if is_conflict(error):
            raise StoreConflict("two transactions were in each other's way; try again in a moment") from error
        # What the driver says names hosts, roles and paths: it goes to the log, not to clients.
        trouble.failed(f"the database cannot do what it was asked: {_first_line(error)}")
        kind = StoreCut if is_cut(error) else StoreUnavailable
        raise kind(
            "the database cannot serve this now; the gateway's log says why. Try again in a moment"
        ) from error


def _first_line(error: BaseException) -> str:
    """What happened, without the statement, and without the row that a server may show below."""
    told = error.orig if isinstance(error, StatementError) and error.orig is not None else error
    return str(told).partition("\n")[0] or type(told).__name__


async def once_it_answers(work: Callable[[], Awaitable[T]], within_s: float) -> T:
    """What `work` gives, tried again while the database does not answer: a server that is being restarted is no reason
    for a gateway not to start. Raises StoreUnavailable when it is still away after `within_s` seconds."""
    deadline = asyncio.get_running_loop().time() + within_s
    waiting = Trouble(log, "the database has been waited for")
    while True:
        try:
            answer = await work()
            waiting.succeeded(surely=True)
            return answer
        except StoreUnavailable:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise
        waiting.failed(f"waiting for the database, for {left_s:.0f} s more")
        await asyncio.sleep(min(_AGAIN_S, left_s))


def is_outage(error: BaseException) -> bool:
    """Whether an error will pass by itself, or when an operator has done something about the server or the disk."""
    if isinstance(error, OSError | PoolTimeout):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, StatementError):  # also when there is no server to connect to again
        return error.orig is not None and is_outage(error.orig)
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) in _SQLITE_CODES
    # asyncpg's errors come wrapped by SQLAlchemy, and plain while a connection is made; both carry the code.
    sqlstate = getattr(error, "sqlstate", None)
    return isinstance(sqlstate, str) and sqlstate.startswith(_SQLSTATES)


def is_cut(error: BaseException) -> bool:
    """Whether it is the way to the server that failed: a new connection may be all that is needed."""
    if isinstance(error, ConnectionError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    if isinstance(error, StatementError):
        return error.orig is not None and is_cut(error.orig)
    sqlstate = getattr(error, "sqlstate", None)
    return isinstance(sqlstate, str) and sqlstate.startswith(_CUT)


def is_conflict(error: BaseException) -> bool:
    """Whether the server has ended a transaction because of another one."""
    if isinstance(error, DBAPIError):
        return error.orig is not None and is_conflict(error.orig)
    return getattr(error, "sqlstate", None) in _CONFLICTS


def _sqlite_code(error: sqlite3.Error) -> int | None:
    """The primary result code; errors of the driver itself have none."""
    extended = getattr(error, "sqlite_errorcode", None)
    return extended & 0xFF if isinstance(extended, int) else None
