"""Make, list and remove API keys, on the machine of the gateway: `python -m gateway.keys add alice`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from gateway.auth import hash_key, new_key
from gateway.errors import ConfigurationError, StoreUnavailable
from gateway.migrate import prepare
from gateway.settings import load_settings
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.records import ApiKey

_LONGEST_NAME = 200


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
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store(Database(settings.url, sqlite_synchronous=settings.sqlite_synchronous))
    try:
        await prepare(store.database, settings)
        store.start()
        match arguments.command:
            case "add":
                return await _add(store, arguments)
            case "list":
                return await _list(store)
            case _:
                return await _remove(store, arguments.hash)
    finally:
        await store.close()


async def _add(store: Store, arguments: argparse.Namespace) -> str:
    for name, value, least in (("owner", arguments.owner, 1), ("label", arguments.label, 0)):
        if not (least <= len(value) <= _LONGEST_NAME and value.isprintable()):
            raise ConfigurationError(
                f"{name} is {value[:_LONGEST_NAME]!r}; it must have {least} to {_LONGEST_NAME} printable characters"
            )
    key = new_key()
    await store.keys.add(
        ApiKey(hash_key(key), arguments.owner, arguments.admin, arguments.label, time.time())
    )
    return f"{key}\n(key of {arguments.owner}; keep it now, it is not stored)"


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
