"""Snapshots of runs, and the inputs that are not needed any more because of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import for_update, now
from gateway.store.records import FutureStatus, RunStatus, Snapshot

S = schema.snapshots
F = schema.futures
R = schema.runs

KEPT = 2
"""Intact snapshots of a run that are kept, so that a damaged one loses nothing."""
_INPUTS_AT_A_TIME = 64
_CURRENT = S.c.superseded_at.is_(None)
_OPEN = (FutureStatus.QUEUED, FutureStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Registration:
    """A snapshot, after operation `seq_id`, that an engine has written in one of its lives."""

    run_id: str
    seq_id: int
    folder: str
    checksums: dict[str, str]
    size_bytes: int
    engine: str
    epoch: int


class SnapshotStore:
    """The snapshots of all runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_run(self, run_id: str) -> list[Snapshot]:
        """Those that a run can be restored from, newest first."""
        query = select(S).where(S.c.run_id == run_id, _CURRENT).order_by(S.c.seq_id.desc())
        return [snapshot_of(row) for row in await self._database.rows(query)]

    async def register(self, registration: Registration) -> bool:
        """Add a snapshot, which supersedes those older than the intact ones that are kept.

        False, and nothing is changed, when the engine's epoch is over or the operation has not been settled.
        """
        return await self._database.write(_register, registration)

    async def set_damage(self, folder: str, damage: str | None) -> None:
        """A snapshot could not be restored, or could be after all."""
        await self._database.write(_set_damages, (folder, damage))

    async def prunable(self, limit: int) -> list[str]:
        """Runs with inputs that their oldest kept snapshot covers."""
        query = (
            select(S.c.run_id)
            .join(R, R.c.run_id == S.c.run_id)
            .where(S.c.damage.is_(None), _CURRENT)
            .group_by(S.c.run_id, R.c.pruned_seq)
            .having(func.count() >= KEPT, func.min(S.c.seq_id) > R.c.pruned_seq)
            .limit(limit)
        )
        return [row.run_id for row in await self._database.rows(query)]

    async def prune(self, run_id: str) -> int:
        """Delete some of the inputs that a run's oldest kept snapshot covers; of how many operations, 0: there are no
        more."""
        return await self._database.write(_prune, run_id, recomputable=True)

    async def forget(self, limit: int, superseded_for: float) -> list[str]:
        """Forget snapshots that have been superseded for so many seconds, and those of runs that take no operation any
        more; their folders."""
        return await self._database.write(_forget, (limit, now() - superseded_for))

    async def known(self, folders: Collection[str]) -> set[str]:
        """Those of some folders that have a row."""
        query = select(S.c.folder).where(S.c.folder.in_(folders))
        return {row.folder for row in await self._database.rows(query)}


def snapshot_of(row: Row[Any]) -> Snapshot:
    """The record of a row."""
    return Snapshot(**row._mapping)


def _register(connection: Connection, registrations: list[Registration]) -> list[bool]:
    return [_register_one(connection, each) for each in registrations]


def _register_one(connection: Connection, registration: Registration) -> bool:
    run_id, seq_id, leases = registration.run_id, registration.seq_id, schema.leases
    lease = for_update(connection, select(leases.c.epoch).where(leases.c.engine == registration.engine))
    settled = select(F.c.status).where(F.c.run_id == run_id, F.c.seq_id == seq_id)
    if connection.execute(lease).scalar() != registration.epoch:
        return False
    if connection.execute(settled).scalar() != FutureStatus.DONE:
        return False
    same = (S.c.run_id == run_id) & (S.c.seq_id == seq_id)
    connection.execute(delete(S).where(same))  # a damaged one, say; its folder is nobody's now
    snapshot = Snapshot(
        run_id=run_id,
        seq_id=seq_id,
        step=_steps_until(connection, run_id, seq_id),
        folder=registration.folder,
        checksums=registration.checksums,
        size_bytes=registration.size_bytes,
        created_at=now(),
    )
    connection.execute(insert(S).values(asdict(snapshot)))
    _supersede_older(connection, run_id)
    return True


def _steps_until(connection: Connection, run_id: str, seq_id: int) -> int:
    steps = schema.steps
    query = select(steps.c.step).where(steps.c.run_id == run_id, steps.c.seq_id <= seq_id)
    return connection.execute(query.order_by(steps.c.step.desc()).limit(1)).scalar() or 0


def _supersede_older(connection: Connection, run_id: str) -> None:
    oldest = _oldest_kept(connection, run_id)
    if oldest is not None:
        older = (S.c.run_id == run_id) & (S.c.seq_id < oldest) & _CURRENT
        connection.execute(update(S).where(older).values(superseded_at=now()))


def _oldest_kept(connection: Connection, run_id: str) -> int | None:
    """The operation of the oldest intact snapshot that is kept; None while there are too few to rely on."""
    intact = select(S.c.seq_id).where(S.c.run_id == run_id, S.c.damage.is_(None), _CURRENT)
    kept = connection.execute(intact.order_by(S.c.seq_id.desc()).limit(KEPT)).scalars().all()
    return kept[-1] if len(kept) == KEPT else None


def _set_damages(connection: Connection, found: list[tuple[str, str | None]]) -> list[None]:
    for folder, damage in found:
        connection.execute(update(S).where(S.c.folder == folder).values(damage=damage))
    return [None] * len(found)


def _prune(connection: Connection, run_ids: list[str]) -> list[int]:
    return [_prune_one(connection, run_id) for run_id in run_ids]


def _prune_one(connection: Connection, run_id: str) -> int:
    """The next few behind those that are gone. The first operation's input stays: a restoration needs it."""
    bound = _oldest_kept(connection, run_id)
    if bound is None:
        return 0
    begun = connection.execute(select(R.c.pruned_seq).where(R.c.run_id == run_id)).scalar() or 0
    numbers = F.c.seq_id.between(begun + 1, bound)
    query = select(F.c.request_id, F.c.seq_id).where(F.c.run_id == run_id, numbers, F.c.status.not_in(_OPEN))
    rows = connection.execute(query.order_by(F.c.seq_id).limit(_INPUTS_AT_A_TIME)).all()
    inputs = schema.inputs
    connection.execute(delete(inputs).where(inputs.c.request_id.in_([row.request_id for row in rows])))
    pruned = rows[-1].seq_id if len(rows) == _INPUTS_AT_A_TIME else bound
    connection.execute(update(R).where(R.c.run_id == run_id).values(pruned_seq=pruned))
    return len(rows)


def _forget(connection: Connection, asked: list[tuple[int, float]]) -> list[list[str]]:
    ended = R.c.status.in_((RunStatus.UNLOADED, RunStatus.FAILED))
    waits = select(F.c.run_id).where(F.c.run_id == R.c.run_id, F.c.status.in_(_OPEN)).exists()
    answers = []
    for limit, before in asked:
        needless = (S.c.superseded_at < before) | (ended & ~waits)
        query = select(S.c.folder).join(R, R.c.run_id == S.c.run_id).where(needless).limit(limit)
        folders = list(connection.execute(query).scalars())
        connection.execute(delete(S).where(S.c.folder.in_(folders)))
        answers.append(folders)
    return answers
