"""What SQLite and Postgres spell differently, and what every table's queries share."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Double, Select, Table, cast, func, select
from sqlalchemy.dialects import postgresql, sqlite

Filters = Mapping[str, str | None]
"""Columns and what they must equal; None filters nothing."""

NO_FILTERS: Filters = {}


def insert_or_ignore(connection: Connection, table: Table) -> Any:
    """An insert that leaves a row with the same key as it is."""
    return _insert_or_ignore(connection.dialect.name, table)


@functools.cache
def _insert_or_ignore(dialect: str, table: Table) -> Any:
    make = sqlite.insert if dialect == "sqlite" else postgresql.insert
    return make(table).on_conflict_do_nothing()


@functools.cache
def insert_new(dialect: str, table: Table, key: str) -> Any:
    """The same, returning the keys of the rows that were new."""
    return _insert_or_ignore(dialect, table).returning(table.c[key])


def for_update(connection: Connection, query: Select[Any]) -> Select[Any]:
    """Keep the rows from changing until the commit. SQLite's writer has the whole database to itself."""
    return query if connection.dialect.name == "sqlite" else query.with_for_update()


def now() -> float:
    """Seconds since the epoch, UTC."""
    return time.time()


_SERVER_CLOCK = select(cast(func.extract("epoch", func.clock_timestamp()), Double))


def clock(connection: Connection) -> float:
    """The same by the database's own clock, which all gateways of a database share."""
    if connection.dialect.name == "sqlite":
        return now()
    return float(connection.execute(_SERVER_CLOCK).scalar_one())
