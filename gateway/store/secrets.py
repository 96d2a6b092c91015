"""What this installation signs with; made once, never shown."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, select

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import insert_or_ignore, now

S = schema.secrets
_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Proposal:
    name: str
    value: bytes


class SecretStore:
    """Random bytes by name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, name: str) -> bytes:
        """The secret of that name; drawn by whoever asks first, the same for all gateways of the database."""
        return await self._database.write(_get_or_keep, _Proposal(name, secrets.token_bytes(_BYTES)))


def _get_or_keep(connection: Connection, proposals: list[_Proposal]) -> list[bytes]:
    kept: list[bytes] = []
    for proposal in proposals:
        row = {"name": proposal.name, "value": proposal.value, "created_at": now()}
        connection.execute(insert_or_ignore(connection, S), [row])
        kept.append(connection.execute(select(S.c.value).where(S.c.name == proposal.name)).scalar_one())
    return kept
