"""Limits of an engine's queues where they are not in memory, at a gateway that does not keep them or has not read them
yet: counted in the database, once a second at most."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from gateway.dispatch.room import Load, bytes_load, owner_load, require_room, run_load, samples_load
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
        self._bytes: Counter[str] = Counter()
        self._last: dict[str, int] = {}

    @property
    def samples(self) -> int:
        """How many samples are open, as far as is known here."""
        return self._samples.total()

    async def look(self) -> None:
        """Count, unless that was done lately."""
        if time.monotonic() - self._counted_at > _COUNTED_FOR_S:
            await self._count()

    async def require_room(self, future: Future) -> None:
        """Raises TooManyRequests when the queue of the run or of its owner is full. What comes before something that
        waits is taken all the same, as at the gateway that has the engine."""
        await self.look()
        run_id, owner = future.run_id, future.owner
        require_room(self._loads(future), lambda: future.seq_id <= self._last.get(run_id or "", -1))
        self._bytes[owner] += future.input_bytes
        if run_id is None:
            self._samples[owner] += 1
            return
        self._last[run_id] = max(future.seq_id, self._last.get(run_id, -1))
        self._of_runs[run_id] += 1
        self._operations[owner] += 1

    def _loads(self, future: Future) -> Iterator[Load]:
        run_id, owner, limits = future.run_id, future.owner, self._settings
        yield bytes_load(self._bytes[owner], limits)
        if run_id is None:
            yield samples_load(self._samples[owner], limits)
        else:
            yield run_load(run_id, self._of_runs[run_id], limits)
            yield owner_load(self._operations[owner], limits)

    async def _count(self) -> None:
        self._counted_at = time.monotonic()
        queues = await self._store.futures.queues(self._engine)
        self._of_runs, self._operations, self._samples = Counter(), Counter(), Counter()
        self._bytes = Counter()
        self._last = {}
        for queue in queues:
            self._bytes[queue.owner] += queue.input_bytes
            if queue.run_id is None:
                self._samples[queue.owner] += queue.waiting
            else:
                self._of_runs[queue.run_id] = queue.waiting
                self._operations[queue.owner] += queue.waiting
                self._last[queue.run_id] = queue.last
