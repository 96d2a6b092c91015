"""What is the database's trouble is told as such, whatever words its driver finds; a broken statement stays a bug."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, literal, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from gateway.errors import StoreUnavailable
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.outages import is_outage, translated_errors
from gateway.troubles import Trouble

WORDS = "worte, die niemand kennt"
"""What a server says in another language."""


def insert(connection: Connection, bodies: list[bytes]) -> list[None]:
    for body in bodies:
        connection.execute(text("INSERT INTO things VALUES (:body)"), {"body": body})
    return [None] * len(bodies)


@asynccontextmanager
async def embedded(path: Path, *pragmas: str) -> AsyncIterator[Database]:
    """A database with one table, whose connections begin with these pragmas."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS things (body BLOB)")
    connection.close()
    database = Database(f"sqlite:///{path}")

    @event.listens_for(database._driver._engine, "connect")  # type: ignore[attr-defined]
    def on_connect(raw: sqlite3.Connection, _record: object) -> None:
        for pragma in pragmas:
            raw.execute(f"PRAGMA {pragma}")

    database.start()
    yield database
    await database.close()


async def test_a_lock_that_another_process_holds_passes(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with embedded(path, "busy_timeout=50") as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable):
            await database.write(insert, b"refused")
        other.execute("COMMIT")
        other.close()
        await database.write(insert, b"taken")
        assert await database.rows(text("SELECT body FROM things")) == [(b"taken",)]


@pytest.mark.parametrize("pragma", ["max_page_count=3", "query_only=ON"])
async def test_a_full_or_read_only_disk_passes(tmp_path: Path, pragma: str) -> None:
    async with embedded(tmp_path / "x.db", pragma) as database:
        with pytest.raises(StoreUnavailable):
            await database.write(insert, b"x" * 100_000)


async def test_a_file_that_cannot_be_opened_passes(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder' / 'x.db'}")
    with pytest.raises(StoreUnavailable):
        await database.first(select(literal(1)))
    await database.close()


async def test_a_broken_statement_is_a_bug(tmp_path: Path) -> None:
    async with embedded(tmp_path / "x.db") as database:
        with pytest.raises(OperationalError):
            await database.rows(text("SELECT 1 FROM connection"))  # a word that outages are told with


def refusal(code: str) -> bytes:
    """A server's message that ends a connection: https://www.postgresql.org/docs/current/protocol-message-formats.html"""
    fields = b"SFATAL\0VFATAL\0C" + code.encode() + b"\0M" + WORDS.encode() + b"\0\0"
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


@asynccontextmanager
async def refusing_server(code: str) -> AsyncIterator[Database]:
    """A database whose server refuses every connection with a code."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def packet() -> bytes:
            length = int.from_bytes(await reader.readexactly(4), "big")
            return await reader.readexactly(length - 4)

        if (await packet())[:4] == (80877103).to_bytes(4, "big"):  # asks for TLS
            writer.write(b"N")
            await packet()
        writer.write(refusal(code))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    database = Database(f"postgresql+asyncpg://x@127.0.0.1:{server.sockets[0].getsockname()[1]}/x")
    yield database
    await database.close()
    server.close()


@pytest.mark.parametrize("code", ["57P03", "53300", "57P01", "08006", "28P01", "3D000"])
async def test_a_server_that_does_not_let_us_in_passes(code: str) -> None:
    async with refusing_server(code) as database:
        with pytest.raises(StoreUnavailable):
            await database.first(select(literal(1)))


async def test_a_server_that_finds_a_bug_says_so() -> None:
    async with refusing_server("42601") as database:
        with pytest.raises(Exception, match=WORDS) as raised:
            await database.first(select(literal(1)))
        assert not isinstance(raised.value, StoreUnavailable)


class _Coded(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("connection shutting down: disk is full")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("code", "outage"),
    [
        ("40001", True),
        ("40P01", True),
        ("25006", True),
        ("53100", True),
        ("58030", True),
        ("57014", True),
        ("23505", False),  # a row is there already
        ("42P01", False),  # no such table
        ("22021", False),  # no text in its encoding
        (None, False),
    ],
)
def test_the_code_decides_and_not_the_words(code: str | None, outage: bool) -> None:
    assert is_outage(_Coded(code)) is outage
    assert is_outage(DBAPIError("SELECT 1", None, _Coded(code))) is outage


@pytest.mark.postgres
async def test_a_server_that_has_become_read_only_passes(empty_pg_url: str) -> None:
    async def administer(statement: Callable[[str], str]) -> None:
        engine = create_async_engine(empty_pg_url)
        async with engine.begin() as connection:
            name = (await connection.exec_driver_sql("SELECT current_database()")).scalar_one()
            await connection.exec_driver_sql(statement(name))
        await engine.dispose()

    await administer(lambda name: "CREATE TABLE things (body bytea)")
    await administer(lambda name: f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database = Database(empty_pg_url)
    database.start()
    with pytest.raises(StoreUnavailable):
        await database.write(insert, b"refused")
    assert await database.rows(text("SELECT body FROM things")) == []
    await database.close()


async def test_no_error_tells_what_was_to_be_written(store: Store) -> None:
    """Somebody's tokens would be in the log; `insert` is broken here, for there is no such table."""
    with pytest.raises(DBAPIError) as broken:
        await store.database.write(insert, b"the data of alice")
    assert "INSERT INTO things" in str(broken.value)
    assert "alice" not in str(broken.value)


def test_an_outage_is_one_line_in_the_log_without_statement_and_data(
    caplog: pytest.LogCaptureFixture,
) -> None:
    why = sqlite3.OperationalError("no room is left\nDETAIL: the row was (alice, 1, 2)")
    why.sqlite_errorcode = sqlite3.SQLITE_FULL
    trouble = Trouble(logging.getLogger("gateway"), "over")
    with pytest.raises(StoreUnavailable), translated_errors(trouble):
        raise OperationalError("INSERT INTO things VALUES (?)", {"body": b"alice"}, why)
    assert [record.message for record in caplog.records] == [
        "the database cannot do what it was asked: no room is left"
    ]
