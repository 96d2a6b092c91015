"""Limits of an engine's queues at a gateway that does not keep them: counted in the database, once a second at most."""

from __future__ import annotations

import time
from collections import Counter

from gateway.errors import TooManyRequests
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.records import Future

_COUNTED_FOR_S = 1.0


class QueuesElsewhere:
    """What waits for one engine: as it was counted, and what has been accepted here since."""

    def __init__(self, store: Store, settings: Settings, engine: str) -> None:
        self._store = store
        self._settings = settings
        self._engine = engine
        self._counted_at = float("-inf")
        self._of_runs: Counter[str] = Counter()
        self._operations: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()
        self._last: dict[str, int] = {}

    async def require_room(self, future: Future) -> None:
        """Raises TooManyRequests when the queue of the run or of its owner is full. What comes before something that
        waits is taken all the same, as at the gateway that has the engine."""
        if time.monotonic() - self._counted_at > _COUNTED_FOR_S:
            await self._count()
        run_id, owner, limits = future.run_id, future.owner, self._settings
        if run_id is None:
            self._require(
                self._samples[owner], limits.max_queued_samples, "samples of yours", "max_queued_samples"
            )
            self._samples[owner] += 1
            return
        if future.seq_id > self._last.get(run_id, -1):
            waiting = f"operations of run {run_id}"
            self._require(self._of_runs[run_id], limits.max_queued_per_run, waiting, "max_queued_per_run")
            waiting = "operations of yours"
            self._require(
                self._operations[owner], limits.max_queued_per_owner, waiting, "max_queued_per_owner"
            )
            self._last[run_id] = future.seq_id
        self._of_runs[run_id] += 1
        self._operations[owner] += 1

    async def _count(self) -> None:
        self._counted_at = time.monotonic()
        queues = await self._store.futures.queues(self._engine)
        self._of_runs, self._operations, self._samples = Counter(), Counter(), Counter()
        self._last = {}
        for queue in queues:
            if queue.run_id is None:
                self._samples[queue.owner] += queue.waiting
            else:
                self._of_runs[queue.run_id] = queue.waiting
                self._operations[queue.owner] += queue.waiting
                self._last[queue.run_id] = queue.last

    def _require(self, waiting: int, largest: int, what: str, setting: str) -> None:
        if waiting >= largest:
            raise TooManyRequests(
                f"{waiting} {what} wait already (setting {setting}); retry when some are done"
            )
