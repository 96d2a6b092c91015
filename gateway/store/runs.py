"""Runs and their metrics."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite, nan
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, select, update

from gateway.store import schema
from gateway.store.audit import record
from gateway.store.database import Database
from gateway.store.dialect import NO_FILTERS, Filters, insert_or_ignore, now
from gateway.store.records import AuditTopic, Comparison, Run, RunStatus, Step
from gateway.store.session_search import NO_PROJECT

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
        project_id: str | None = None,
    ) -> list[Run]:
        """Newest first; `where` filters by column; `before` is (created_at, run_id) of the last row seen."""
        query = select(R).order_by(R.c.created_at.desc(), R.c.run_id.desc()).limit(limit).offset(offset)
        for column, value in where.items():
            if value is not None:
                query = query.where(R.c[column] == value)
        if project_id is not None:
            query = query.where(_in_project(project_id))
        if before is not None:
            created_at, run_id = before
            query = query.where(
                (R.c.created_at < created_at) | ((R.c.created_at == created_at) & (R.c.run_id < run_id))
            )
        return [run_of(row) for row in await self._database.rows(query)]

    async def count(self, owner: str | None, project_id: str | None = None) -> int:
        """How many runs an owner (None: everybody) has, in a project if one is named."""
        query = select(func.count()).select_from(R)
        if owner is not None:
            query = query.where(R.c.owner == owner)
        if project_id is not None:
            query = query.where(_in_project(project_id))
        return int((await self._database.rows(query))[0][0])

    async def of_session(self, session_id: str) -> list[Run]:
        query = select(R).where(R.c.session_id == session_id).order_by(R.c.model_seq_id)
        return [run_of(row) for row in await self._database.rows(query)]

    async def unload(self, run_id: str) -> None:
        """End a run: it takes no further operations. Repeating it changes nothing."""
        await self._database.write(unload_runs, run_id)

    async def record_difference(self, run_id: str, difference: str) -> None:
        """A replay of the run has given other numbers than it gave before."""
        await self._database.write(_record_differences, (run_id, difference))

    async def record_comparison(self, run_id: str, owner: str, comparison: Comparison) -> None:
        """A sampler has been compared with the trainer; nothing, if the run is not that owner's."""
        await self._database.write(_record_comparisons, (run_id, owner, comparison))

    async def steps(self, run_id: str, *, after: int = 0, limit: int = 1000) -> list[Step]:
        """Metrics of the optimizer steps above `after`, in order."""
        query = select(S).where(S.c.run_id == run_id, S.c.step > after).order_by(S.c.step).limit(limit)
        return [Step(**row._mapping) for row in await self._database.rows(query)]


def _in_project(project_id: str) -> ColumnElement[bool]:
    sessions = schema.sessions
    named = func.coalesce(sessions.c.project_id, NO_PROJECT) == project_id
    return R.c.session_id.in_(select(sessions.c.session_id).where(named))


def run_of(row: Row[Any]) -> Run:
    """The record of a row."""
    values = dict(row._mapping)
    compared = values["comparison"]
    if compared is not None:
        numbers: dict[str, Any] = {name: nan if each is None else each for name, each in compared.items()}
        compared = Comparison(**numbers)
    return Run(**{**values, "status": RunStatus(values["status"]), "comparison": compared})


def insert_runs(connection: Connection, runs: list[Run]) -> None:
    """Runs that are known already stay as they are."""
    connection.execute(insert_or_ignore(connection, R), [asdict(run) for run in runs])


def _record_differences(connection: Connection, found: list[tuple[str, str]]) -> list[None]:
    for run_id, difference in found:
        connection.execute(update(R).where(R.c.run_id == run_id).values(replay_difference=difference))
    return [None] * len(found)


def _record_comparisons(connection: Connection, found: list[tuple[str, str, Comparison]]) -> list[None]:
    for run_id, owner, comparison in found:
        numbers = {name: each if isfinite(each) else None for name, each in asdict(comparison).items()}
        of_owner = (R.c.run_id == run_id) & (R.c.owner == owner)
        connection.execute(update(R).where(of_owner).values(comparison=numbers))
    return [None] * len(found)


def unload_runs(connection: Connection, run_ids: list[str]) -> list[None]:
    loaded = update(R).where(R.c.run_id.in_(run_ids), R.c.status != RunStatus.UNLOADED)
    change = loaded.values(status=RunStatus.UNLOADED, last_request_at=now())
    for row in connection.execute(change.returning(R.c.run_id, R.c.owner)).all():
        record(connection, row.owner, AuditTopic.RUNS, "run_unloaded", training_run_id=row.run_id)
    return [None] * len(run_ids)
