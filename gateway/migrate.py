"""Bring a database to the newest schema: `python -m gateway.migrate`.

The embedded database is migrated at start; Postgres only by this command, so that an operator decides when.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from gateway.data_folder import make_private
from gateway.errors import ConfigurationError, StoreUnavailable
from gateway.settings import Settings, load_settings
from gateway.store.database import Database

MIGRATIONS = Path(__file__).parents[1] / "migrations"


def alembic_config() -> Config:
    """Alembic's configuration; the connection is handed over by `upgrade`."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    return config


async def upgrade(database: Database) -> None:
    """Apply what is missing."""

    def apply(connection: Connection) -> None:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    await database.alone(apply)


async def is_current(database: Database) -> bool:
    """Whether the schema is this version's."""

    def revision(connection: Connection) -> Any:
        return MigrationContext.configure(connection).get_current_revision()

    current = await database.read(revision)
    return bool(current == ScriptDirectory.from_config(alembic_config()).get_current_head())


async def prepare(database: Database, settings: Settings) -> None:
    """Called at start: migrate the embedded database; refuse a Postgres that is behind."""
    if settings.embedded:
        await upgrade(database)
    elif not await is_current(database):
        raise ConfigurationError(
            "the database's schema is not this version's; run `python -m gateway.migrate` with the same settings, "
            "then start again"
        )


async def _main() -> None:
    settings = load_settings()
    make_private(settings)
    database = Database(settings.url)
    try:
        await upgrade(database)
    finally:
        await database.close()


if __name__ == "__main__":
    try:
        asyncio.run(_main())
    except (ConfigurationError, StoreUnavailable) as problem:
        sys.exit(f"migrate: {problem}")
    sys.stdout.write("The database is up to date.\n")
