"""Damage to what a run would be restored from: its newest snapshot, while the one before it is intact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from gateway.store import schema
from tests.faults.scene import Scene

_KEPT = 2


def damage_newest(scene: Scene, draw: random.Random) -> bool:
    """Truncate, change or remove a file of one run's newest snapshot; whether there was one to be damaged."""
    found = [folder for folder in _replaceable(scene) if any(folder.glob("*"))]
    if not found:
        return False
    folder = draw.choice(sorted(found))
    scene.damaged.add(folder.name)
    path = draw.choice(sorted(folder.glob("*")))
    content = path.read_bytes()
    match draw.choice(["truncate", "change", "remove"]):
        case "truncate":
            path.write_bytes(content[: len(content) // 2])
        case "change":
            place = draw.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        case "remove":
            path.unlink()
    return True


def _replaceable(scene: Scene) -> Iterator[Path]:
    """Folders of the newest snapshots of runs that have an older one, neither damaged here."""
    snapshots = schema.snapshots
    query = select(snapshots.c.run_id, snapshots.c.folder).where(
        snapshots.c.superseded_at.is_(None), snapshots.c.damage.is_(None)
    )
    try:
        with create_engine(scene.sync_url, poolclass=NullPool).connect() as connection:
            rows = connection.execute(query.order_by(snapshots.c.run_id, snapshots.c.seq_id.desc())).all()
    except DBAPIError:
        return  # Postgres is just starting
    of_run: dict[str, list[Path]] = {}
    for row in rows:
        of_run.setdefault(row.run_id, []).append(scene.folder / "storage" / row.folder)
    for folders in of_run.values():
        if len(folders) >= _KEPT and not any(folder.name in scene.damaged for folder in folders):
            yield folders[0]
