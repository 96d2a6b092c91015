"""Custom losses: what clients have traced, or why it was refused."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, select

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import insert_or_ignore
from gateway.store.records import StoredLoss

L = schema.custom_losses


class CustomLossStore:
    """The custom losses of all sessions. Rows never change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, loss: StoredLoss) -> None:
        """Store a loss; repeating it changes nothing."""
        await self._database.write(_create, loss)

    async def get(self, loss_id: str) -> StoredLoss | None:
        row = await self._database.first(select(L).where(L.c.loss_id == loss_id))
        return StoredLoss(**row._mapping) if row is not None else None


def _create(connection: Connection, losses: list[StoredLoss]) -> list[None]:
    connection.execute(insert_or_ignore(connection, L), [asdict(loss) for loss in losses])
    return [None] * len(losses)
