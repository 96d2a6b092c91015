"""Runs and their metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import NO_FILTERS, Filters, insert_or_ignore, now
from gateway.store.records import Run, RunStatus, Step

R = schema.runs
S = schema.steps


class RunStore:
    """The runs of all owners. A run is inserted together with its first future, see `gateway.store.futures`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, run_id: str) -> Run | None:
        row = await self._database.first(select(R).where(R.c.run_id == run_id))
        return run_of(row) if row is not None else None

    async def page(
        self,
        *,
        limit: int,
        before: tuple[float, str] | None = None,
        offset: int = 0,
        where: Filters = NO_FILTERS,
    ) -> list[Run]:
        """Newest first; `where` filters by column; `before` is (created_at, run_id) of the last row seen."""
        query = select(R).order_by(R.c.created_at.desc(), R.c.run_id.desc()).limit(limit).offset(offset)
        for column, value in where.items():
            if value is not None:
                query = query.where(R.c[column] == value)
        if before is not None:
            created_at, run_id = before
            query = query.where(
                (R.c.created_at < created_at) | ((R.c.created_at == created_at) & (R.c.run_id < run_id))
            )
        return [run_of(row) for row in await self._database.rows(query)]

    async def count(self, owner: str) -> int:
        query = select(func.count()).select_from(R).where(R.c.owner == owner)
        return int((await self._database.rows(query))[0][0])

    async def of_session(self, session_id: str) -> list[Run]:
        query = select(R).where(R.c.session_id == session_id).order_by(R.c.model_seq_id)
        return [run_of(row) for row in await self._database.rows(query)]

    async def unload(self, run_id: str) -> None:
        """End a run: it takes no further operations. Repeating it changes nothing."""
        await self._database.write(unload_runs, run_id)

    async def steps(self, run_id: str, *, after: int = 0, limit: int = 1000) -> list[Step]:
        """Metrics of the optimizer steps above `after`, in order."""
        query = select(S).where(S.c.run_id == run_id, S.c.step > after).order_by(S.c.step).limit(limit)
        return [Step(**row._mapping) for row in await self._database.rows(query)]


def run_of(row: Row[Any]) -> Run:
    """The record of a row."""
    values = dict(row._mapping)
    return Run(**{**values, "status": RunStatus(values["status"])})


def insert_runs(connection: Connection, runs: list[Run]) -> None:
    """Runs that are known already stay as they are."""
    connection.execute(insert_or_ignore(connection, R), [asdict(run) for run in runs])


def unload_runs(connection: Connection, run_ids: list[str]) -> list[None]:
    statement = update(R).where(R.c.run_id.in_(run_ids))
    connection.execute(statement.values(status=RunStatus.UNLOADED, last_request_at=now()))
    return [None] * len(run_ids)
