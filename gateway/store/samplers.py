"""Samplers: a base model, alone or with a version of an adapter; an inflight one samples the newest of its run's."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, select, update

from gateway.store import schema
from gateway.store.checkpoints import record_read, require_checkpoints
from gateway.store.database import Database
from gateway.store.dialect import insert_new, insert_or_ignore
from gateway.store.records import Reference, Sampler

S = schema.samplers
C = schema.sampler_clients


class SamplerStore:
    """The samplers of all owners. Rows never change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, sampler: Sampler) -> None:
        """Store a sampler; repeating it changes nothing. Raises NotFound when its checkpoint has gone meanwhile."""
        await self._database.write(_create, sampler)

    async def get(self, sampler_id: str) -> Sampler | None:
        row = await self._database.first(select(S).where(S.c.sampler_id == sampler_id))
        return Sampler(**row._mapping) if row is not None else None

    async def newest_inflight(self, run_id: str) -> str | None:
        """The folder of the weights that were last saved as inflight for a run; rows are as old as their saves."""
        newest = select(S.c.folder).where(S.c.run_id == run_id, S.c.inflight_seq.is_not(None))
        row = await self._database.first(newest.order_by(S.c.inflight_seq.desc()).limit(1))
        return row.folder if row is not None else None

    async def join(self, sampler_id: str) -> int:
        """The number of a further client of a sampler: 1, 2, 3 …, none twice."""
        return await self._database.write(_join, sampler_id)

    async def of_session(self, session_id: str) -> list[Sampler]:
        query = select(S).where(S.c.session_id == session_id).order_by(S.c.created_at)
        return [Sampler(**row._mapping) for row in await self._database.rows(query)]


def insert_samplers(connection: Connection, samplers: list[Sampler]) -> None:
    connection.execute(insert_or_ignore(connection, S), [asdict(sampler) for sampler in samplers])


def _join(connection: Connection, sampler_ids: list[str]) -> list[int]:
    numbers: list[int] = []
    for sampler_id in sampler_ids:
        row = {"sampler_id": sampler_id, "joined": 0}
        connection.execute(insert_or_ignore(connection, C), [row])
        count = update(C).where(C.c.sampler_id == sampler_id).values(joined=C.c.joined + 1)
        numbers.append(connection.execute(count.returning(C.c.joined)).scalar_one())
    return numbers


def _create(connection: Connection, samplers: list[Sampler]) -> list[None]:
    statement = insert_new(connection.dialect.name, S, "sampler_id")
    new = set(connection.execute(statement, [asdict(sampler) for sampler in samplers]).scalars())
    references = [
        (each.owner, Reference(each.path, each.folder))
        for each in samplers
        if each.sampler_id in new and each.path is not None and each.folder is not None
    ]
    require_checkpoints(connection, [reference for _, reference in references])
    for reader, reference in references:
        record_read(connection, reader, reference, "sampling")
    return [None] * len(samplers)
