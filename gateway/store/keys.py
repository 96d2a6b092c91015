"""API keys, by their hashes."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, delete, select

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import insert_or_ignore
from gateway.store.records import ApiKey

K = schema.api_keys


class KeyStore:
    """Who may call. An empty table means that only this machine may."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[ApiKey]:
        rows = await self._database.rows(select(K).order_by(K.c.created_at))
        return [ApiKey(**row._mapping) for row in rows]

    async def add(self, key: ApiKey) -> None:
        await self._database.write(_insert, key)

    async def remove(self, key_hash: str) -> bool:
        """Whether there was such a key."""
        return await self._database.write(_delete, key_hash)


def _insert(connection: Connection, keys: list[ApiKey]) -> list[None]:
    connection.execute(insert_or_ignore(connection, K), [asdict(key) for key in keys])
    return [None] * len(keys)


def _delete(connection: Connection, hashes: list[str]) -> list[bool]:
    removed = []
    for key_hash in hashes:
        statement = delete(K).where(K.c.key_hash == key_hash).returning(K.c.key_hash)
        removed.append(connection.execute(statement).first() is not None)
    return removed
