"""Leases: which gateway process dispatches for an engine, and which start of that engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import for_update, insert_or_ignore, now

L = schema.leases


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """`holder` wants to dispatch for `engine` for the next `seconds`."""

    engine: str
    holder: str
    seconds: float


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


def _take(connection: Connection, requests: list[LeaseRequest]) -> list[int | None]:
    epochs: list[int | None] = []
    for request in requests:
        fresh = {"engine": request.engine, "holder": request.holder, "epoch": 0, "expires_at": 0.0}
        connection.execute(insert_or_ignore(connection, L), fresh)
        row = (
            connection.execute(for_update(connection, select(L).where(L.c.engine == request.engine)))
        ).one()
        if row.holder != request.holder and row.expires_at > now():
            epochs.append(None)
            continue
        change = {"holder": request.holder, "epoch": row.epoch + 1, "expires_at": now() + request.seconds}
        connection.execute(update(L).where(L.c.engine == request.engine).values(change))
        epochs.append(row.epoch + 1)
    return epochs


def _renew(connection: Connection, requests: list[LeaseRequest]) -> list[bool]:
    renewed = []
    for request in requests:
        statement = (
            update(L)
            .where(L.c.engine == request.engine, L.c.holder == request.holder)
            .values(expires_at=now() + request.seconds)
            .returning(L.c.engine)
        )
        renewed.append(connection.execute(statement).first() is not None)
    return renewed
