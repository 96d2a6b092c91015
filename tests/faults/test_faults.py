"""The short form of `python -m tests.faults`: a few faults on each database, and no number changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.haste import hurried
from tests.faults.__main__ import HASTE, PARTS
from tests.faults.episode import play
from tests.faults.scene import DatabaseName

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # The SDK warns of its own deprecations, and leaves the connections of its background loops to the collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
FAULTS = 5


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_faults_change_no_number(database: DatabaseName, tmp_path: Path) -> None:
    kind = replace(PARTS[database][0].kind, steps=20)
    said: list[str] = []
    with hurried(HASTE):
        episode = play(kind, FAULTS, seed=4, seconds=60, folder=tmp_path, progress=said.append)
    assert episode.problems == []
    assert len(episode.happened) == FAULTS
    assert episode.courses >= 8
    assert episode.calls["optim_step done"] == 20 * episode.courses
    assert len([line for line in said if f" of {FAULTS}: " in line]) == FAULTS
