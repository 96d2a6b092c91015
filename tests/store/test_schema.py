"""A database that the migrations have made is what the schema says, partial indexes with their conditions too."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect

from gateway.store import Store, schema


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    found: list[object] = []
    for each in compare_metadata(context, schema.metadata):
        found += each if isinstance(each, list) else [each]
    return [each for each in found if not (isinstance(each, tuple) and each[0] == "modify_comment")]


async def test_migrated_is_what_the_schema_says(store: Store) -> None:
    assert await store.database.read(differences) == []


async def test_indexes_hold_the_same_rows(store: Store) -> None:
    """Alembic does not compare conditions; PostgreSQL writes them its own way, so they are compared on SQLite."""
    fresh = create_engine("sqlite://")
    schema.metadata.create_all(fresh)

    def conditions(connection: Connection) -> dict[str, str]:
        key = f"{connection.dialect.name}_where"
        return {
            str(index["name"]): str(index["dialect_options"][key])
            for table in schema.metadata.tables
            for index in inspect(connection).get_indexes(table)
            if key in index.get("dialect_options", {})
        }

    migrated = await store.database.read(conditions)
    with fresh.connect() as connection:
        expected = conditions(connection)
    assert migrated.keys() == expected.keys()
    assert "postgresql" in str(store.database.engines()[0].url) or migrated == expected
