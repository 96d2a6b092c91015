"""Checkpoints, and which stored folders are still needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, exists, func, select, union_all, update

from gateway.errors import NotFound
from gateway.store import schema
from gateway.store.audit import record
from gateway.store.database import Database
from gateway.store.dialect import NO_FILTERS, Filters, for_update, insert_or_ignore, now
from gateway.store.records import AuditTopic, Checkpoint, CheckpointKind, Reference
from gateway.store.usage import begin_storing, end_storing, set_end_of_storing

A = schema.samplers
F = schema.futures
C = schema.checkpoints


@dataclass(frozen=True, slots=True)
class Selection:
    """Checkpoints by what they are. None, and an empty prefix, filter nothing.

    Times are seconds since the epoch: created at `after` or later, and before `before`. The newest `keep_last` of each
    run and kind are left out, whatever else is asked for.
    """

    owner: str | None = None
    run_id: str | None = None
    kind: CheckpointKind | None = None
    base_model: str | None = None
    name_prefix: str = ""
    after: float | None = None
    before: float | None = None
    keep_last: int = 0


class CheckpointStore:
    """The checkpoints of all owners. One is inserted when the operation that saved it is settled."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, path: str) -> Checkpoint | None:
        """A checkpoint by its tinker:// path; an expired one is gone."""
        query = select(C).where(C.c.path == path)
        row = await self._database.first(query)
        if row is None or (row.expires_at is not None and row.expires_at <= now()):
            return None
        return checkpoint_of(row)

    async def to_be_saved(self, run_id: str, path: str, before: int) -> int | None:
        """The newest operation of a run, below number `before`, that is to save under a path and has not done so."""
        query = (
            select(F.c.seq_id, F.c.context)
            .where(F.c.run_id == run_id, F.c.kind == "save_weights", schema.OPEN, F.c.seq_id < before)
            .order_by(F.c.seq_id.desc())
        )
        saves = await self._database.rows(query)
        return next((row.seq_id for row in saves if _saves_as(row.context) == path), None)

    async def page(
        self,
        *,
        limit: int,
        before: tuple[float, str] | None = None,
        offset: int = 0,
        where: Filters = NO_FILTERS,
        kinds: Collection[CheckpointKind] = tuple(CheckpointKind),
    ) -> list[Checkpoint]:
        """Newest first, without expired ones; `before` is (created_at, path) of the last row seen."""
        query = (
            select(C).where(_alive(), C.c.kind.in_(kinds)).order_by(C.c.created_at.desc(), C.c.path.desc())
        )
        for column, value in where.items():
            if value is not None:
                query = query.where(C.c[column] == value)
        if before is not None:
            created_at, path = before
            query = query.where(
                (C.c.created_at < created_at) | ((C.c.created_at == created_at) & (C.c.path < path))
            )
        rows = await self._database.rows(query.limit(limit).offset(offset))
        return [checkpoint_of(row) for row in rows]

    async def count(self, owner: str, kinds: Collection[CheckpointKind] = tuple(CheckpointKind)) -> int:
        query = select(func.count()).select_from(C).where(C.c.owner == owner, _alive(), C.c.kind.in_(kinds))
        return int((await self._database.rows(query))[0][0])

    async def bytes_of(self, owner: str, besides: str | None = None) -> int:
        """What all checkpoints of an owner have, one that shares its files as much as the others; and the weights of
        the owner's samplers that are no checkpoint, those in the folder `besides` left out."""
        named = select(func.coalesce(func.sum(C.c.size_bytes), 0).label("bytes"))
        folders = select(C.c.folder).where(C.c.owner == owner, _alive())
        held = (
            select(func.max(A.c.size_bytes).label("bytes"))
            .where(schema.SOLE, A.c.owner == owner, A.c.folder.not_in(folders))
            .where(A.c.folder != (besides or ""))
            .group_by(A.c.folder)
            .subquery()
        )
        unnamed = select(func.coalesce(func.sum(held.c.bytes), 0))
        query = union_all(named.where(C.c.owner == owner, _alive()), unnamed)
        return sum(int(row[0]) for row in await self._database.rows(query))

    async def latest_of_runs(self, run_ids: list[str]) -> dict[tuple[str, str], Checkpoint]:
        """The newest checkpoint of each (run, kind)."""
        query = select(C).where(C.c.run_id.in_(run_ids), _alive()).order_by(C.c.created_at)
        rows = await self._database.rows(query)
        return {(row.run_id, row.kind): checkpoint_of(row) for row in rows}

    async def select(self, selection: Selection, limit: int) -> list[Checkpoint]:
        """At most `limit` of those that a selection is of, oldest first, without expired ones."""
        rows = await self._database.rows(_selected(selection).limit(limit))
        return [checkpoint_of(row) for row in rows]

    async def delete(self, path: str) -> str | None:
        """Delete a checkpoint; the answer is its folder if nothing else refers to it."""
        return await self._database.write(delete_checkpoints, path)

    async def delete_expired(self, limit: int) -> tuple[int, list[str]]:
        """Delete at most `limit` that have expired: how many there were, and the folders that nothing refers to."""
        return await self._database.write(_delete_expired, limit)

    async def set_expiry(self, path: str, expires_at: float | None) -> None:
        await self._database.write(_set_expiries, (path, expires_at))

    async def set_public(self, path: str, public: bool) -> None:
        await self._database.write(_set_public, (path, public))


def _saves_as(context: dict[str, Any]) -> str | None:
    """The path of a save that gives a name."""
    path: str | None = context.get("checkpoint", {}).get("path")
    return path


def checkpoint_of(row: Row[Any]) -> Checkpoint:
    """The record of a row."""
    values = dict(row._mapping)
    return Checkpoint(**{**values, "kind": CheckpointKind(values["kind"])})


def _alive() -> Any:
    return C.c.expires_at.is_(None) | (C.c.expires_at > now())


def insert_checkpoint(
    connection: Connection, checkpoint: Checkpoint, *, overwrite: bool
) -> tuple[bool, str | None]:
    """Whether the name was free, or could be overwritten; and the folder that was replaced."""
    row = (
        connection.execute(
            select(C.c.folder, C.c.expires_at, C.c.size_bytes).where(C.c.path == checkpoint.path)
        )
    ).first()
    expired = row is not None and row.expires_at is not None and row.expires_at <= now()
    if row is not None and row.folder != checkpoint.folder and not (overwrite or expired):
        return False, None
    connection.execute(delete(C).where(C.c.path == checkpoint.path))
    connection.execute(insert_or_ignore(connection, C), asdict(checkpoint))
    if row is not None and row.folder != checkpoint.folder:
        _tell_samplers(connection, checkpoint.path, row.folder, row.size_bytes)
    if row is None or row.folder != checkpoint.folder:
        event = "checkpoint_created" if row is None or expired else "checkpoint_overwritten"
        end_storing(connection, [checkpoint.path])
        begin_storing(connection, checkpoint)
        _record(connection, checkpoint.owner, event, checkpoint.path, size_bytes=checkpoint.size_bytes)
    return True, row.folder if row is not None and row.folder != checkpoint.folder else None


def require_checkpoints(connection: Connection, references: list[Reference]) -> None:
    """See to it that folders about to be referred to are a checkpoint's until this transaction has committed.

    The rows are locked: whoever deletes one waits, and then finds the new reference. Raises NotFound, which undoes the
    transaction, when one has been deleted or replaced since it was looked up.
    """
    for reference in sorted(references, key=lambda each: each.path):
        alike = (C.c.path == reference.path) & (C.c.folder == reference.folder)
        query = for_update(connection, select(C.c.path).where(alike, _alive()))
        if connection.execute(query).first() is None:
            raise NotFound(
                f"there is no checkpoint {reference.path} any more: it was deleted or replaced just now",
                param="path",
            )


def folder_in_use(connection: Connection, folder: str) -> bool:
    """Whether a checkpoint, a sampler, or the log of a run refers to a stored folder.

    A log refers to what it begins at and to what its operations load; a save's own folder is the checkpoint's.
    """
    references = union_all(
        select(C.c.path).where(C.c.folder == folder),
        select(schema.samplers.c.sampler_id).where(
            schema.samplers.c.folder == folder, schema.samplers.c.released_at.is_(None)
        ),
        select(schema.runs.c.run_id).where(schema.runs.c.origin_folder == folder),
        select(F.c.request_id).where(F.c.folder == folder, F.c.kind == "load_weights"),
    )
    return bool((connection.execute(select(exists(references.subquery().select())))).scalar_one())


def _selected(selection: Selection) -> Select[Any]:
    """Rank first, among all of a run and kind, then filter: the newest ones stay even when a filter hides others."""
    age = func.row_number().over(
        partition_by=(C.c.run_id, C.c.kind), order_by=(C.c.created_at.desc(), C.c.path.desc())
    )
    ranked = select(C, age.label("age")).where(_alive()).subquery()
    columns = ranked.c
    query = select(*(columns[column.name] for column in C.c)).where(columns.age > selection.keep_last)
    for name in ("owner", "run_id", "kind", "base_model"):
        value = getattr(selection, name)
        if value is not None:
            query = query.where(columns[name] == value)
    if selection.name_prefix:
        query = query.where(columns.name.startswith(selection.name_prefix, autoescape=True))
    if selection.after is not None:
        query = query.where(columns.created_at >= selection.after)
    if selection.before is not None:
        query = query.where(columns.created_at < selection.before)
    return query.order_by(columns.created_at, columns.path)


def _delete_expired(connection: Connection, limits: list[int]) -> list[tuple[int, list[str]]]:
    answers = []
    for limit in limits:
        query = select(C.c.path).where(C.c.expires_at <= now()).order_by(C.c.expires_at).limit(limit)
        paths = list(connection.execute(for_update(connection, query)).scalars())
        folders = delete_checkpoints(connection, paths)
        answers.append((len(paths), [folder for folder in folders if folder is not None]))
    return answers


def delete_checkpoints(connection: Connection, paths: list[str]) -> list[str | None]:
    folders: list[str | None] = []
    for path in paths:
        statement = delete(C).where(C.c.path == path)
        row = connection.execute(
            statement.returning(C.c.folder, C.c.owner, C.c.expires_at, C.c.size_bytes)
        ).first()
        if row is None:
            folders.append(None)
            continue
        expired = row.expires_at is not None and row.expires_at <= now()
        end_storing(connection, [path])
        _tell_samplers(connection, path, row.folder, row.size_bytes)
        _record(connection, row.owner, "checkpoint_expired" if expired else "checkpoint_deleted", path)
        folders.append(None if folder_in_use(connection, row.folder) else row.folder)
    return folders


def _tell_samplers(connection: Connection, path: str, folder: str, size_bytes: int) -> None:
    """Those that were made from a checkpoint outlive it, until some time after the end of their sessions; from now on
    its bytes are theirs."""
    made_from_it = (A.c.folder == folder) & (A.c.path == path)
    change = {"checkpoint_gone": True, "size_bytes": size_bytes}
    connection.execute(update(A).where(made_from_it).values(change))


def _set_expiries(connection: Connection, changes: list[tuple[str, float | None]]) -> list[None]:
    for path, expires_at in changes:
        change = update(C).where(C.c.path == path).values(expires_at=expires_at)
        owner = connection.execute(change.returning(C.c.owner)).scalar()
        if owner is not None:
            set_end_of_storing(connection, path, expires_at)
            _record(connection, owner, "checkpoint_ttl_set", path, expires_at=expires_at)
    return [None] * len(changes)


def _set_public(connection: Connection, changes: list[tuple[str, bool]]) -> list[None]:
    for path, public in changes:
        change = update(C).where(C.c.path == path, C.c.public != public).values(public=public)
        owner = connection.execute(change.returning(C.c.owner)).scalar()
        if owner is not None:
            _record(connection, owner, "checkpoint_published" if public else "checkpoint_unpublished", path)
    return [None] * len(changes)


def record_read(connection: Connection, reader: str, reference: Reference, purpose: str) -> None:
    """Write down that weights were taken; also for their owner, when that is somebody else."""
    owner = connection.execute(select(C.c.owner).where(C.c.path == reference.path)).scalar_one()
    for whose in sorted({reader, owner}):
        _record(connection, whose, "checkpoint_read", reference.path, purpose=purpose, reader=reader)


def _record(connection: Connection, owner: str, event: str, path: str, **details: Any) -> None:
    record(connection, owner, AuditTopic.CHECKPOINTS, event, tinker_path=path, **details)
