"""Make, list and remove API keys, on the machine of the gateway: `python -m gateway.keys add alice`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from sqlalchemy import make_url

from gateway.auth import LOCAL_OWNER, hash_key, new_key
from gateway.data_folder import make_private
from gateway.errors import ConfigurationError, StoreUnavailable
from gateway.migrate import prepare
from gateway.settings import Settings, load_settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.records import ApiKey

_LONGEST_NAME = 200
_ELSEWHERE = (
    "start where the gateway was started, or say with TANDEM_DATA_DIR or TANDEM_CONFIG where its data are"
)
_FIRST = f"""
This is the first key: from now on every request needs one. What was made without keys belongs to the owner
{LOCAL_OWNER!r} and is not seen with this one; `tandem keys add {LOCAL_OWNER}` makes a key for it."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway.keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key; it is shown once")
    add.add_argument("owner", help="who the key stands for")
    add.add_argument("--label", default="", help="what it is used for")
    add.add_argument("--admin", action="store_true", help="sees everybody's runs in the admin API")
    commands.add_parser("list", help="owners, labels and hashes")
    remove = commands.add_parser("remove", help="a key stops working within seconds")
    remove.add_argument("hash", help="the first characters of its hash, as `list` shows it")
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> str:
    settings = load_settings()
    where = _where(settings)
    _make_or_find(settings, where, make=arguments.command == "add")
    store = Store(Database(settings.url, sqlite_synchronous=settings.sqlite_synchronous))
    try:
        await prepare(store.database, settings)
        store.start()
        match arguments.command:
            case "add":
                said = await _add(store, arguments)
            case "list":
                said = await _list(store)
            case _:
                said = await _remove(store, arguments.hash)
        return f"{said}\n(database: {where})"
    finally:
        await store.close()


def _make_or_find(settings: Settings, where: str, *, make: bool) -> None:
    """Only a first key may make a database: a list of another one's keys would be a wrong answer."""
    if make:
        make_private(settings)
    elif settings.embedded and not Path(where).exists():
        raise ConfigurationError(f"there is no database at {where}; {_ELSEWHERE}")


def _where(settings: Settings) -> str:
    """Which database is meant: a path, or an address without its password."""
    if settings.embedded:
        return str(Path(make_url(settings.url).database or "").absolute())
    return make_url(settings.url).render_as_string(hide_password=True)


async def _add(store: Store, arguments: argparse.Namespace) -> str:
    for name, value, least in (("owner", arguments.owner, 1), ("label", arguments.label, 0)):
        if not (least <= len(value) <= _LONGEST_NAME and value.isprintable()):
            raise ConfigurationError(
                f"{name} is {value[:_LONGEST_NAME]!r}; it must have {least} to {_LONGEST_NAME} printable characters"
            )
    key = new_key()
    first = not await store.keys.all()
    await store.keys.add(
        ApiKey(hash_key(key), arguments.owner, arguments.admin, arguments.label, time.time())
    )
    said = f"{key}\n(key of {arguments.owner}; keep it now, it is not stored)"
    return f"{said}\n{_FIRST}" if first and arguments.owner != LOCAL_OWNER else said


async def _list(store: Store) -> str:
    keys = await store.keys.all()
    lines = [
        f"{key.key_hash[:12]}  {key.owner}{' (admin)' if key.admin else ''}  {key.label}" for key in keys
    ]
    return "\n".join(lines) or "There are no keys: only programs on this machine are served."


async def _remove(store: Store, prefix: str) -> str:
    matching = [key for key in await store.keys.all() if key.key_hash.startswith(prefix)]
    if len(matching) != 1:
        raise ConfigurationError(
            f"{len(matching)} keys have a hash that begins with {prefix!r}; exactly one must"
        )
    await store.keys.remove(matching[0].key_hash)
    return f"The key of {matching[0].owner} is removed."


if __name__ == "__main__":
    try:
        sys.stdout.write(asyncio.run(_run(_arguments())) + "\n")
    except (ConfigurationError, StoreUnavailable) as problem:
        sys.exit(f"keys: {problem}")
