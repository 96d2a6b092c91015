"""Samplers: a base model, alone or with a version of an adapter; an inflight one samples the newest of its run's."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import asdict

from sqlalchemy import Connection, select, update

from gateway.errors import Unprocessable
from gateway.store import schema
from gateway.store.checkpoints import record_read, require_checkpoints
from gateway.store.database import Database
from gateway.store.dialect import NO_FILTERS, Filters, insert_new, insert_or_ignore, now
from gateway.store.records import Reference, Sampler

S = schema.samplers
C = schema.sampler_clients

_TOLD_EVERY_S = 60.0
_REMEMBERED = 10_000
"""Samplers whose last use is in memory; what is forgotten is written once more."""


class SamplerStore:
    """The samplers of all owners. Rows never change, but for what becomes of their weights and when they were used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._told: OrderedDict[str, float] = OrderedDict()

    async def create(self, sampler: Sampler) -> None:
        """Store a sampler; repeating it changes nothing. Raises NotFound when its checkpoint has gone meanwhile, and
        Unprocessable when its number has been used for other weights."""
        await self._database.write(_create, sampler)

    async def get(self, sampler_id: str) -> Sampler | None:
        row = await self._database.first(select(S).where(S.c.sampler_id == sampler_id))
        return Sampler(**row._mapping) if row is not None else None

    async def newest_inflight(self, run_id: str) -> Sampler | None:
        """The sampler of the weights that were last saved as inflight for a run; rows are as old as their saves."""
        newest = select(S).where(S.c.run_id == run_id, S.c.inflight_seq.is_not(None))
        row = await self._database.first(newest.order_by(S.c.inflight_seq.desc()).limit(1))
        return Sampler(**row._mapping) if row is not None else None

    def sampled(self, sampler_id: str) -> None:
        """A sampler is in use. That is written once a minute, along with a transaction that comes soon."""
        at = now()
        if at - self._told.get(sampler_id, float("-inf")) < _TOLD_EVERY_S:
            return
        self._told[sampler_id] = at
        self._told.move_to_end(sampler_id)
        if len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        written = self._database.write_behind(_set_sampled, (sampler_id, at))
        written.add_done_callback(lambda _: self._forget_unwritten(sampler_id, written))

    def _forget_unwritten(self, sampler_id: str, written: asyncio.Future[None]) -> None:
        if not written.cancelled() and written.exception() is not None:
            self._told.pop(sampler_id, None)  # the next sample tries again

    async def join(self, sampler_id: str) -> int:
        """The number of a further client of a sampler: 1, 2, 3 …, none twice."""
        return await self._database.write(_join, sampler_id)

    async def page(
        self, *, limit: int, before: tuple[float, str] | None = None, where: Filters = NO_FILTERS
    ) -> list[Sampler]:
        """Newest first; `where` filters by column; `before` is (created_at, sampler_id) of the last row seen."""
        query = select(S).order_by(S.c.created_at.desc(), S.c.sampler_id.desc()).limit(limit)
        for column, value in where.items():
            if value is not None:
                query = query.where(S.c[column] == value)
        if before is not None:
            created_at, sampler_id = before
            older = (S.c.created_at == created_at) & (S.c.sampler_id < sampler_id)
            query = query.where((S.c.created_at < created_at) | older)
        return [Sampler(**row._mapping) for row in await self._database.rows(query)]

    async def of_session(self, session_id: str) -> list[Sampler]:
        query = select(S).where(S.c.session_id == session_id).order_by(S.c.created_at)
        return [Sampler(**row._mapping) for row in await self._database.rows(query)]


def insert_sampler(connection: Connection, sampler: Sampler) -> Sampler | None:
    """Insert a sampler unless its number is taken by other weights; the one that has taken it, if so."""
    statement = insert_new(connection.dialect.name, S, "sampler_id")
    if connection.execute(statement, [asdict(sampler)]).scalars().all():
        return None
    stored = _stored(connection, sampler.sampler_id)
    return None if _weights(stored) == _weights(sampler) else stored


def require_same_weights(stored: Sampler, base_model: str | None, path: str | None) -> None:
    """Whether a sampler is what is asked for again under its number. A checkpoint counts by its path: what is stored
    there may have changed since. Raises Unprocessable."""
    number = stored.sampler_id.rpartition(":")[2]
    taken = f"but sampler {number} of this session samples {described(stored)}; give another sampling_session_seq_id"
    if path != stored.path or (path is None and stored.folder is not None):
        asked = "not given" if path is None else repr(path)
        raise Unprocessable(f"model_path is {asked}, {taken}", param="model_path")
    if base_model != stored.base_model and (base_model is not None or path is None):
        raise Unprocessable(f"base_model is {base_model!r}, {taken}", param="base_model")


def described(sampler: Sampler) -> str:
    """Its weights, for a person."""
    if sampler.path is not None:
        return sampler.path
    if sampler.folder is not None:
        return f"unnamed weights of run {sampler.run_id}"
    return f"base model {sampler.base_model!r}"


def _stored(connection: Connection, sampler_id: str) -> Sampler:
    return Sampler(**connection.execute(select(S).where(S.c.sampler_id == sampler_id)).one()._mapping)


def _weights(sampler: Sampler) -> tuple[object, ...]:
    return sampler.run_id, sampler.path, sampler.folder, sampler.inflight_seq, sampler.base_model


def _set_sampled(connection: Connection, uses: list[tuple[str, float]]) -> list[None]:
    for sampler_id, at in sorted(uses):
        connection.execute(update(S).where(S.c.sampler_id == sampler_id).values(sampled_at=at))
    return [None] * len(uses)


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
    for each in samplers:
        stored = _stored(connection, each.sampler_id) if len(new) < len(samplers) else each
        require_same_weights(stored, each.base_model, each.path)
    references = [
        (each.owner, Reference(each.path, each.folder))
        for each in samplers
        if each.sampler_id in new and each.path is not None and each.folder is not None
    ]
    require_checkpoints(connection, [reference for _, reference in references])
    for reader, reference in references:
        record_read(connection, reader, reference, "sampling")
    return [None] * len(samplers)
