"""What an engine has told at its last start, for gateways that do not have it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy import Connection, select, update

from engines.interface import EngineInfo
from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import insert_or_ignore

E = schema.engine_facts


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the start `epoch` of an engine has told."""

    engine: str
    epoch: int
    info: EngineInfo
    tokenizer_files: dict[str, bytes]


class EngineFactStore:
    """One row an engine."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tell(self, facts: EngineFacts) -> None:
        """Replace what an earlier start has told; a later one's stays."""
        await self._database.write(_tell, facts, recomputable=True)

    async def newer_than(self, engine: str, epoch: int) -> EngineFacts | None:
        """What a start after `epoch` has told, if there is one."""
        row = await self._database.first(select(E).where(E.c.engine == engine, E.c.epoch > epoch))
        if row is None:
            return None
        info = msgspec.msgpack.decode(row.info, type=EngineInfo)
        files = msgspec.msgpack.decode(row.tokenizer_files, type=dict[str, bytes])
        return EngineFacts(engine, row.epoch, info, files)


def _tell(connection: Connection, told: list[EngineFacts]) -> list[None]:
    for facts in told:
        values = {
            "epoch": facts.epoch,
            "info": msgspec.msgpack.encode(facts.info),
            "tokenizer_files": msgspec.msgpack.encode(facts.tokenizer_files),
        }
        connection.execute(insert_or_ignore(connection, E), {"engine": facts.engine, **values})
        connection.execute(
            update(E).where(E.c.engine == facts.engine, E.c.epoch < facts.epoch).values(values)
        )
    return [None] * len(told)
