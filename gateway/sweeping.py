"""Freeing stored folders that nothing names: what killed processes have left half written, and what they had written
when the outcome was stored by nobody.

A folder that no row names is never referred to later on: a row that names it comes from a row that did before, or from
the outcome of an operation that is open. So to look once is enough; only what was written lately may still get its row.
"""

from __future__ import annotations

import asyncio
import time

from engines.distant_folders import without_credentials
from engines.storage import MARK
from gateway.checkpoints import remove_folder
from gateway.sealing import plain_folder
from gateway.settings import Settings
from gateway.store import Store

GRACE_S = 86400.0
"""Seconds since a folder was last written to before it counts as left behind."""
FOLDER = "checkpoints"
_AT_A_TIME = 200
_PLAIN = plain_folder("")
_PARTIAL = ".partial"


class ForeignStorage(Exception):
    """The folder holds the files of another database."""


async def sweep(store: Store, settings: Settings) -> int:
    """Free what nothing names; how many folders that were. Raises ForeignStorage, and frees nothing, when the folder
    belongs to another database, as when an operator has changed `database_url` and nothing else."""
    storage = settings.storage
    keys = await asyncio.to_thread(storage.older_than, FOLDER, time.time() - GRACE_S)
    found = [key.removeprefix(f"{FOLDER}/") for key in keys]
    partial = [name for name in found if name.endswith(_PARTIAL)]
    whole = [name for name in found if not name.startswith(".")]
    needed = await _needed(store, whole)
    secret = (await store.secrets.get("storage")).hex()
    await asyncio.to_thread(_require_ours, settings, secret, known=bool(needed) or not whole)
    strays = [name for name in whole if name not in needed]
    for name in partial + strays:
        await remove_folder(settings, f"{FOLDER}/{name}")
    return len(partial) + len(strays)


async def _needed(store: Store, names: list[str]) -> set[str]:
    """Those that are named. What an export wrote to be encrypted is needed until it is."""
    needed: set[str] = set()
    for start in range(0, len(names), _AT_A_TIME):
        part = names[start : start + _AT_A_TIME]
        keys = {name: f"{FOLDER}/{name.removesuffix(_PLAIN)}" for name in part}
        named, written = await store.retention.named(sorted(set(keys.values())))
        needed |= {name for name, key in keys.items() if key in (written if name.endswith(_PLAIN) else named)}
    return needed


def _require_ours(settings: Settings, secret: str, *, known: bool) -> None:
    storage = settings.storage
    owner = storage.owner()
    if not owner and known:
        storage.claim(secret)
    if not (owner == secret if owner else known):
        place = without_credentials(settings.storage_url) or settings.storage_dir
        raise ForeignStorage(
            f"{place} holds the files of another database, so nothing there is freed. If it is this one's after all, "
            f"remove its {MARK} and all folders that this database does not name"
        )
