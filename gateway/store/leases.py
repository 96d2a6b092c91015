"""Leases: which gateway process dispatches for an engine, and which start of that engine counts.

Their times are the database's, so that gateways whose clocks differ agree when one has run out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, ScalarSelect, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import clock, for_update, insert_or_ignore
from gateway.store.notices import Notice

L = schema.leases
G = schema.gateways


def newest_epoch(engine: ColumnElement[str]) -> ScalarSelect[Any]:
    """The newest epoch of an engine, as part of another statement; null for one that has never been started."""
    return select(L.c.epoch).where(L.c.engine == engine).scalar_subquery()


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """`holder` wants to dispatch for `engine` for the next `seconds`. There the engine is in `state`, and `problem`
    says why it is not well."""

    engine: str
    holder: str
    seconds: float
    state: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Who dispatches for an engine, where other gateways reach that process, and what the engine does there."""

    engine: str
    holder: str
    epoch: int
    seconds_left: float
    state: str | None
    problem: str | None
    url: str


class LeaseStore:
    """One row an engine."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, request: LeaseRequest) -> int | None:
        """A new epoch, higher than all before; None while another holder's lease runs."""
        return await self._database.write(_take, request)

    async def renew(self, request: LeaseRequest) -> bool:
        """Whether the lease is still this holder's."""
        return await self._database.write(_renew, request)

    async def give_back(self, request: LeaseRequest) -> None:
        """Let others take it at once, if it is still this holder's."""
        free = Notice("free", "", request.engine)
        await self._database.write(_give_back, request, notice=free)

    async def get(self, engine: str) -> Lease | None:
        """An engine's lease, also one that has run out; None before its first start."""
        return await self._database.read(lambda connection: _get(connection, engine))


def _take(connection: Connection, requests: list[LeaseRequest]) -> list[int | None]:
    epochs: list[int | None] = []
    for request in requests:
        fresh = {"engine": request.engine, "holder": request.holder, "epoch": 0, "expires_at": 0.0}
        connection.execute(insert_or_ignore(connection, L), fresh)
        row = (
            connection.execute(for_update(connection, select(L).where(L.c.engine == request.engine)))
        ).one()
        now = clock(connection)
        if row.holder != request.holder and row.expires_at > now:
            epochs.append(None)
            continue
        change = {**_claim(request, now), "holder": request.holder, "epoch": row.epoch + 1}
        connection.execute(update(L).where(L.c.engine == request.engine).values(change))
        epochs.append(row.epoch + 1)
    return epochs


def _renew(connection: Connection, requests: list[LeaseRequest]) -> list[bool]:
    now = clock(connection)
    return [_update(connection, request, _claim(request, now)) for request in requests]


def _give_back(connection: Connection, requests: list[LeaseRequest]) -> list[None]:
    for request in requests:
        _update(connection, request, {**_claim(request, 0.0), "expires_at": 0.0})
    return [None] * len(requests)


def _claim(request: LeaseRequest, now: float) -> dict[str, object]:
    return {"expires_at": now + request.seconds, "state": request.state, "problem": request.problem}


def _update(connection: Connection, request: LeaseRequest, change: dict[str, object]) -> bool:
    mine = (L.c.engine == request.engine) & (L.c.holder == request.holder)
    return connection.execute(update(L).where(mine).values(change).returning(L.c.engine)).first() is not None


def _get(connection: Connection, engine: str) -> Lease | None:
    query = select(L, G.c.url).outerjoin(G, G.c.holder == L.c.holder).where(L.c.engine == engine)
    row = connection.execute(query).first()
    if row is None:
        return None
    left = row.expires_at - clock(connection)
    return Lease(engine, row.holder, row.epoch, left, row.state, row.problem, row.url or "")
