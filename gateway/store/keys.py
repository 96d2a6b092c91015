"""API keys, by their hashes."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, delete, select

from gateway.store import schema
from gateway.store.audit import record
from gateway.store.database import Database
from gateway.store.dialect import for_update, insert_new
from gateway.store.records import ApiKey, AuditTopic

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

    async def remove_unless_last(self, key_hash: str) -> bool:
        """The same, but the only key there is stays."""
        return await self._database.write(_delete_unless_last, key_hash)

    async def remove(self, key_hash: str) -> bool:
        """Whether there was such a key."""
        return await self._database.write(_delete, key_hash)


def _delete_unless_last(connection: Connection, hashes: list[str]) -> list[bool]:
    """All keys are locked, in one order: of two gateways that remove one each, the second finds what the first left."""
    keys = set(
        connection.execute(for_update(connection, select(K.c.key_hash).order_by(K.c.key_hash))).scalars()
    )
    removed = []
    for key_hash in hashes:
        if keys - {key_hash}:
            removed += _delete(connection, [key_hash])
            keys.discard(key_hash)
        else:
            removed.append(False)
    return removed


def _insert(connection: Connection, keys: list[ApiKey]) -> list[None]:
    statement = insert_new(connection.dialect.name, K, "key_hash")
    new = set(connection.execute(statement, [asdict(key) for key in keys]).scalars())
    for key in keys:
        if key.key_hash in new:
            _record(connection, key, "api_key_created")
    return [None] * len(keys)


def _delete(connection: Connection, hashes: list[str]) -> list[bool]:
    removed = []
    for key_hash in hashes:
        row = connection.execute(delete(K).where(K.c.key_hash == key_hash).returning(K)).first()
        if row is not None:
            _record(connection, ApiKey(**row._mapping), "api_key_deleted")
        removed.append(row is not None)
    return removed


def _record(connection: Connection, key: ApiKey, event: str) -> None:
    details = {"key_id": key.key_id, "label": key.label, "admin": key.admin}
    record(connection, key.owner, AuditTopic.ORGANIZATIONS, event, **details)
