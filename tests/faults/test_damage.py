"""Damage is done where it can be made good: to the newest snapshot of a run that has an older one, once."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, insert

from gateway.store import schema
from tests.faults.damage import damage_newest

CONTENT = bytes(range(200))


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    """Run "two" has two snapshots and one that they supersede, run "one" has one."""
    url = f"sqlite:///{tmp_path / 'tandem.db'}"
    kept = [("two", 10, None), ("two", 20, None), ("two", 5, 1.0), ("one", 30, None)]
    common = {"step": 1, "checksums": {}, "size_bytes": 1, "created_at": 0.0, "damage": None}
    rows = []
    for run_id, seq_id, superseded_at in kept:
        folder = f"snapshots/{run_id}-{seq_id}"
        place = tmp_path / "storage" / folder
        place.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            (place / name).write_bytes(CONTENT)
        rows.append(
            {"run_id": run_id, "seq_id": seq_id, "folder": folder, "superseded_at": superseded_at, **common}
        )
    engine = create_engine(url)
    schema.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(schema.snapshots), rows)
    engine.dispose()
    return SimpleNamespace(sync_url=url, folder=tmp_path, damaged=set())


def damaged(folder: Path) -> list[str]:
    """Snapshots with a file that is not as it was written."""
    names = []
    for place in sorted((folder / "storage" / "snapshots").iterdir()):
        files = list(place.iterdir())
        if len(files) < 2 or any(path.read_bytes() != CONTENT for path in files):
            names.append(place.name)
    return names


@pytest.mark.parametrize("seed", range(6))
def test_the_newest_of_two_is_damaged_and_nothing_else(scene: Any, tmp_path: Path, seed: int) -> None:
    assert damage_newest(scene, random.Random(seed))
    assert damaged(tmp_path) == ["two-20"]
    assert scene.damaged == {"two-20"}


def test_a_run_with_a_damaged_one_is_left_alone(scene: Any, tmp_path: Path) -> None:
    draw = random.Random(1)
    assert damage_newest(scene, draw)
    assert not damage_newest(scene, draw)
    assert damaged(tmp_path) == ["two-20"]
