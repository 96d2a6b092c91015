"""The gateway processes of one database, by their signs of life."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import clock, insert_or_ignore

G = schema.gateways
_FORGOTTEN_AFTER = 20
"""Times `seconds` after which the row of a process that was killed goes."""


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """The process `holder`, reached by other gateways at `url`, lives; who has not said so for `seconds` does not."""

    holder: str
    url: str
    seconds: float


class GatewayStore:
    """One row a process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, sign: SignOfLife) -> frozenset[str]:
        """Say that this process lives; which others do."""
        return await self._database.write(_report, sign, recomputable=True)

    async def leave(self, holder: str) -> None:
        """This process ends."""
        await self._database.write(_leave, holder, recomputable=True)


def _report(connection: Connection, signs: list[SignOfLife]) -> list[frozenset[str]]:
    return [_report_one(connection, sign) for sign in signs]


def _report_one(connection: Connection, sign: SignOfLife) -> frozenset[str]:
    now = clock(connection)
    row = {"holder": sign.holder, "url": sign.url, "seen_at": now}
    connection.execute(insert_or_ignore(connection, G), row)
    mine = G.c.holder == sign.holder
    connection.execute(update(G).where(mine).values(url=sign.url, seen_at=now))
    connection.execute(delete(G).where(~mine, G.c.seen_at < now - _FORGOTTEN_AFTER * sign.seconds))
    others = select(G.c.holder).where(~mine, G.c.seen_at > now - sign.seconds)
    return frozenset(connection.execute(others).scalars())


def _leave(connection: Connection, holders: list[str]) -> list[None]:
    connection.execute(delete(G).where(G.c.holder.in_(holders)))
    return [None] * len(holders)
