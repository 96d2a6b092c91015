"""What snapshots make needless: inputs that the oldest kept one covers, older snapshots, files that nobody knows."""

from __future__ import annotations

from functools import partial

from gateway.pacing import Pace
from gateway.snapshot_files import SnapshotFiles
from gateway.store import Store

STRAY_S = 3600.0
"""Age from which a folder that no row names is nobody's: one that is being written gets its row within seconds."""
_AT_A_TIME = 100


async def prune_inputs(store: Store, pace: Pace) -> int:
    """Delete the inputs of operations that every kept snapshot of their run contains, few at a time; of how many."""
    total = 0
    while run_ids := await store.snapshots.prunable(_AT_A_TIME):
        for run_id in run_ids:
            while passed := await pace.batch(partial(store.snapshots.prune, run_id)):
                total += passed
    return total


async def remove_needless(store: Store, files: SnapshotFiles, superseded_for: float, pace: Pace) -> int:
    """Remove snapshots that have been superseded for so many seconds, and those of runs that take no operation any
    more; how many. A row goes first: its files are strays if this ends in between."""
    total = 0
    forget = partial(store.snapshots.forget, _AT_A_TIME, superseded_for)
    while folders := await pace.batch(forget):
        total += await _remove(files, folders)
    return total


async def remove_strays(store: Store, files: SnapshotFiles) -> int:
    """Remove files that have been left behind; how many snapshots. Raises SnapshotsUnreachable."""
    database = await store.secrets.get("storage")
    total = await files.put_away_older_than(STRAY_S, database)
    written = await files.older_than(STRAY_S, database)
    for begin in range(0, len(written), _AT_A_TIME):
        some = written[begin : begin + _AT_A_TIME]
        known = await store.snapshots.known(some)
        total += await _remove(files, [folder for folder in some if folder not in known])
    return total


async def _remove(files: SnapshotFiles, folders: list[str]) -> int:
    for folder in folders:
        await files.remove(folder)
    return len(folders)
