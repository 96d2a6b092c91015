"""Retention: what is deleted after its time, some rows at a time, so that nobody waits long for the writer.

Each statement finds its rows by an index that holds nothing else than what may go: a full table is pruned as fast as a
small one (`tests/store/test_plans.py`, `benchmarks/full_table.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, or_, select, union_all, update

from gateway.store import schema
from gateway.store.checkpoints import folder_in_use
from gateway.store.database import Database
from gateway.store.dialect import now

F = schema.futures
R = schema.runs
S = schema.sessions
A = schema.samplers
C = schema.checkpoints
L = schema.custom_losses

EXPIRED = "expired"
"""The reason of a session's end when its client has been silent for too long."""


@dataclass(frozen=True, slots=True)
class Batch:
    """At most `limit` of what has been over since `before`, in seconds since the epoch."""

    before: float
    limit: int


@dataclass(frozen=True, slots=True)
class Released:
    """Samplers whose weights are not kept any more, and the folders that nothing refers to."""

    sampler_ids: list[str]
    folders: list[str]


class RetentionStore:
    """Each call is one batch in one transaction; fewer than `limit` means that there is no more at present."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def end_silent_sessions(self, batch: Batch) -> list[str]:
        """End sessions that were not heard of since; their ids. Work of a session's runs is a sign of life."""
        return await self._database.write(_end_silent_sessions, batch)

    async def idle_of(self, run_ids: Collection[str]) -> list[str]:
        """Those of some runs whose session has ended, and that have done nothing since."""
        ended = S.c.finished_at.is_not(None) & (R.c.last_request_at <= S.c.finished_at)
        query = select(R.c.run_id).join(S, S.c.session_id == R.c.session_id).where(ended)
        rows = await self._database.rows(query.where(R.c.run_id.in_(run_ids)))
        return [row.run_id for row in rows]

    async def delete_results(self, batch: Batch) -> int:
        """Delete results that were stored before; their futures stay, and how many they were."""
        return await self._database.write(_delete_results, batch, recomputable=True)

    async def delete_futures(self, batch: Batch) -> int:
        """Delete futures that no log needs, with what is left of them; how many they were."""
        return await self._database.write(_delete_futures, batch, recomputable=True)

    async def delete_dead_logs(self, batch: Batch) -> int:
        """Delete futures of runs that ended before and take no operation any more; how many they were."""
        return await self._database.write(_delete_dead_logs, batch, recomputable=True)

    async def release_samplers(self, batch: Batch) -> Released:
        """Give up weights that are no checkpoint: of samplers of sessions that ended before, those that newer inflight
        ones of their run have followed before, and unnamed ones that were not used since, if their run has newer ones.
        Their rows say so from then on."""
        return await self._database.write(_release_samplers, batch)

    async def named(self, folders: Collection[str]) -> tuple[set[str], set[str]]:
        """Which of some stored folders anything refers to or is about to write; and those that are about to be
        written."""
        loads = or_(F.c.kind == "load_weights", schema.OPEN)
        kept = A.c.released_at.is_(None)
        queries = [
            select(C.c.folder).where(C.c.folder.in_(folders)),
            select(A.c.folder).where(A.c.folder.in_(folders), kept),
            select(R.c.origin_folder).where(R.c.origin_folder.in_(folders)),
            select(F.c.folder).where(F.c.folder.in_(folders), loads),
        ]
        named = {row[0] for row in await self._database.rows(union_all(*queries))}
        written = select(F.c.folder).where(F.c.folder.in_(folders), schema.OPEN)
        return named, {row.folder for row in await self._database.rows(written)}

    async def delete_losses(self, batch: Batch) -> int:
        """Delete custom losses of sessions that ended before; how many they were."""
        return await self._database.write(_delete_losses, batch, recomputable=True)


def _end_silent_sessions(connection: Connection, batches: list[Batch]) -> list[list[str]]:
    ended = []
    for batch in batches:
        working = exists().where(R.c.session_id == S.c.session_id, R.c.last_request_at >= batch.before)
        silent = and_(schema.ALIVE, S.c.created_at < batch.before, S.c.heartbeat_at < batch.before)
        found = select(S.c.session_id).where(silent, ~working).order_by(S.c.created_at).limit(batch.limit)
        ids = list(connection.execute(found).scalars())
        # a heartbeat that came in between counts
        still = and_(S.c.session_id.in_(ids), schema.ALIVE, S.c.heartbeat_at < batch.before)
        change = update(S).where(still).values(finished_at=now(), finish_reason=EXPIRED)
        ended.append(list(connection.execute(change.returning(S.c.session_id)).scalars()))
    return ended


def _delete_results(connection: Connection, batches: list[Batch]) -> list[int]:
    table = schema.results
    deleted = []
    for batch in batches:
        oldest = select(table.c.request_id).where(table.c.stored_at < batch.before)
        ids = list(connection.execute(oldest.order_by(table.c.stored_at).limit(batch.limit)).scalars())
        connection.execute(delete(table).where(table.c.request_id.in_(ids)))
        deleted.append(len(ids))
    return deleted


def _delete_futures(connection: Connection, batches: list[Batch]) -> list[int]:
    deleted = []
    for batch in batches:
        oldest = select(F.c.request_id).where(schema.SPENT, F.c.finished_at < batch.before)
        ids = list(connection.execute(oldest.order_by(F.c.finished_at).limit(batch.limit)).scalars())
        _delete_with_bodies(connection, ids)
        deleted.append(len(ids))
    return deleted


def _delete_dead_logs(connection: Connection, batches: list[Batch]) -> list[int]:
    """A log owns the checkpoint it begins at: when its last entry has gone, so has that reference."""
    deleted = []
    for batch in batches:
        of_run = F.c.run_id == R.c.run_id
        dead = exists().where(of_run) & ~exists().where(of_run, schema.OPEN)
        ended = select(R.c.run_id).where(schema.ENDED, R.c.last_request_at < batch.before, dead)
        run_id = connection.execute(ended.order_by(R.c.last_request_at).limit(1)).scalar()
        if run_id is None:
            deleted.append(0)
            continue
        entries = select(F.c.request_id).where(F.c.run_id == run_id).order_by(F.c.seq_id.desc())
        ids = list(connection.execute(entries.limit(batch.limit)).scalars())
        _delete_with_bodies(connection, ids)
        if connection.execute(entries.limit(1)).first() is None:
            connection.execute(update(R).where(R.c.run_id == run_id).values(origin_folder=None))
        deleted.append(len(ids))
    return deleted


def _delete_with_bodies(connection: Connection, request_ids: list[str]) -> None:
    for table in (schema.inputs, schema.results, F):
        connection.execute(delete(table).where(table.c.request_id.in_(request_ids)))


def _release_samplers(connection: Connection, batches: list[Batch]) -> list[Released]:
    released = []
    for batch in batches:
        query = select(A.c.sampler_id).where(
            schema.SOLE, or_(_orphaned(batch), _superseded(batch), _unused(batch))
        )
        ids = list(connection.execute(query.where(_unawaited()).limit(batch.limit)).scalars())
        change = update(A).where(A.c.sampler_id.in_(ids)).values(released_at=now()).returning(A.c.folder)
        folders = dict.fromkeys(connection.execute(change).scalars())
        unused = [folder for folder in folders if not folder_in_use(connection, folder)]
        released.append(Released(ids, unused))
    return released


def _orphaned(batch: Batch) -> ColumnElement[bool]:
    over = select(S.c.session_id).where(S.c.session_id == A.c.session_id, S.c.finished_at < batch.before)
    return over.exists()


def _superseded(batch: Batch) -> ColumnElement[bool]:
    newer = A.alias()
    follows = and_(
        newer.c.run_id == A.c.run_id,
        newer.c.inflight_seq > A.c.inflight_seq,
        newer.c.created_at < batch.before,
    )
    return A.c.inflight_seq.is_not(None) & exists().where(follows)


def _unused(batch: Batch) -> ColumnElement[bool]:
    """Whether unnamed weights have not been sampled since, and newer ones of the run were there already."""
    newer = A.alias()
    follows = and_(
        newer.c.run_id == A.c.run_id,
        newer.c.path.is_(None),
        newer.c.created_at > A.c.created_at,
        newer.c.created_at < batch.before,
    )
    idle = func.coalesce(A.c.sampled_at, A.c.created_at) < batch.before
    return and_(A.c.path.is_(None), A.c.inflight_seq.is_(None), idle, exists().where(follows))


def _unawaited() -> ColumnElement[bool]:
    """Whether no open sample is to be drawn from the weights. Those of an inflight one may be asked for by any inflight
    sampler of its run."""
    awaited = select(F.c.sampler_id).where(schema.OPEN, F.c.sampler_id.is_not(None))
    other = A.alias()
    busy = select(other.c.run_id).where(other.c.inflight_seq.is_not(None), other.c.sampler_id.in_(awaited))
    return and_(A.c.sampler_id.not_in(awaited), or_(A.c.inflight_seq.is_(None), A.c.run_id.not_in(busy)))


def _delete_losses(connection: Connection, batches: list[Batch]) -> list[int]:
    deleted = []
    for batch in batches:
        over = select(S.c.session_id).where(S.c.session_id == L.c.session_id, S.c.finished_at < batch.before)
        ids = list(connection.execute(select(L.c.loss_id).where(over.exists()).limit(batch.limit)).scalars())
        connection.execute(delete(L).where(L.c.loss_id.in_(ids)))
        deleted.append(len(ids))
    return deleted
