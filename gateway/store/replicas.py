"""How many replicas an engine is to have, and which of them owes a sample.

A sample is owed by the engine that its row names. It moves to another one by changing that name, and loses its claim:
claiming and settling compare the name, so whoever had it before can do nothing to it any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from sqlalchemy import Connection, exists, insert, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import clock, insert_or_ignore
from gateway.store.futures import future_of
from gateway.store.notices import Notice
from gateway.store.records import Future, FutureStatus

F = schema.futures
R = schema.replicas
L = schema.leases
_SAMPLE = F.c.kind == "sample"


@dataclass(frozen=True, slots=True)
class Move:
    """A sample that `source` owes is to be drawn by the engine `target`."""

    request_id: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many replicas an engine is to have, and the bounds of that which an admin has set; None: the settings'."""

    engine: str
    number: int
    smallest: int | None = None
    largest: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """There are to be `after` replicas of an engine, if there were to be `before` until now."""

    engine: str
    before: int
    after: int


class ReplicaStore:
    """One row an engine whose number of replicas has ever been decided upon."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, engine: str) -> Wanted | None:
        """What was decided last; None: nothing yet."""
        row = await self._database.first(select(R).where(R.c.engine == engine))
        return Wanted(row.engine, row.wanted, row.smallest, row.largest) if row is not None else None

    async def put(self, wanted: Wanted) -> None:
        """Decide, whatever was decided before."""
        await self._database.write(_put, wanted)

    async def change(self, change: Change) -> None:
        """Decide, unless another gateway has decided something else meanwhile."""
        await self._database.write(_change, change)

    async def move(self, move: Move, notice: Notice | None = None) -> Future | None:
        """The sample as it is owed from now on; None if it was not open any more, or not owed by `source`."""
        return await self._database.write(_move, move, recomputable=True, notice=notice)

    async def orphans(self, engines: Sequence[str], limit: int) -> list[Future]:
        """Open samples of engines whose lease nobody has, oldest first."""

        def read(connection: Connection) -> list[Future]:
            held = exists().where(L.c.engine == F.c.engine, L.c.expires_at > clock(connection))
            query = select(F).where(F.c.engine.in_(engines), schema.OPEN, _SAMPLE, ~held)
            return [future_of(row) for row in connection.execute(query.order_by(F.c.created_at).limit(limit))]

        return await self._database.read(read)


def moved_to(engine: str, sample: Future) -> Future:
    """The record of a sample once it has moved."""
    return replace(sample, engine=engine, epoch=None, status=FutureStatus.QUEUED)


def _put(connection: Connection, decisions: list[Wanted]) -> list[None]:
    for decision in decisions:
        values = {"wanted": decision.number, "smallest": decision.smallest, "largest": decision.largest}
        known = connection.execute(update(R).where(R.c.engine == decision.engine).values(values))
        if known.rowcount == 0:
            connection.execute(insert(R).values(engine=decision.engine, **values))
    return [None] * len(decisions)


def _change(connection: Connection, changes: list[Change]) -> list[None]:
    for change in changes:
        connection.execute(
            insert_or_ignore(connection, R), {"engine": change.engine, "wanted": change.before}
        )
        unchanged = (R.c.engine == change.engine) & (R.c.wanted == change.before)
        connection.execute(update(R).where(unchanged).values(wanted=change.after))
    return [None] * len(changes)


def _move(connection: Connection, moves: list[Move]) -> list[Future | None]:
    moved: dict[str, Future] = {}
    for (source, target), group in groupby(moves, key=lambda move: (move.source, move.target)):
        owed = F.c.request_id.in_([move.request_id for move in group]) & (F.c.engine == source)
        values = {"engine": target, "epoch": None, "status": FutureStatus.QUEUED}
        changed = update(F).where(owed, schema.OPEN, _SAMPLE).values(values).returning(F)
        moved |= {row.request_id: future_of(row) for row in connection.execute(changed)}
    return [moved.get(move.request_id) for move in moves]
