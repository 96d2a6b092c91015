"""What is given up after its time: sessions of silent clients, results, old calls, weights without a name."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from gateway.checkpoints import remove_folder
from gateway.fleet import Fleet
from gateway.pacing import Pace
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.retention import Batch

_BATCH = 100
"""Rows of one transaction: some milliseconds of the only writer's time."""


class Retention:
    """Each method is one round of a duty, and answers how many things it has given up. `on_released` is told of each
    sampler whose weights went."""

    def __init__(
        self, store: Store, settings: Settings, fleet: Fleet, on_released: Callable[[str], None]
    ) -> None:
        self._store = store
        self._settings = settings
        self._fleet = fleet
        self._on_released = on_released
        self._rows = store.retention
        self.pace = Pace()

    async def end_silent_sessions(self) -> int:
        """End sessions whose clients were not heard of for long; nothing stored goes with them."""
        timeout_s = self._settings.session_timeout_s

        async def batch() -> int:
            return len(await self._rows.end_silent_sessions(_over(timeout_s)))

        return await self._in_batches(batch)

    async def drop_idle_runs(self) -> int:
        """Free what this process's engines hold of runs whose session has ended, whichever gateway ended it. Their logs
        stay: a later operation restores them."""
        resident = [
            run_id for each in self._fleet.dispatchers.values() for run_id in each.training.residency.runs
        ]
        dropped = 0
        for start in range(0, len(resident), _BATCH):
            for run_id in await self._rows.idle_of(resident[start : start + _BATCH]):
                run = await self._store.runs.get(run_id)
                if run is not None:
                    await self._fleet.drop_run(run)
                    dropped += 1
        return dropped

    async def delete_results(self) -> int:
        """Results that nobody may fetch any more."""
        kept_s = self._settings.result_retention_s
        return await self._in_batches(lambda: self._rows.delete_results(_over(kept_s)))

    async def delete_futures(self) -> int:
        """Calls that no log needs, and the logs of runs that have ended."""
        kept_s = self._settings.future_retention_s
        found = await self._in_batches(lambda: self._rows.delete_futures(_over(kept_s)))
        while deleted := await self._in_batches(lambda: self._rows.delete_dead_logs(_over(kept_s))):
            found += deleted  # the end of a log is a small batch, and there may be another one
        return found

    async def release_weights(self) -> int:
        """Weights without a name, with their files."""
        kept_s = self._settings.unnamed_retention_s

        async def batch() -> int:
            released = await self._rows.release_samplers(_over(kept_s))
            for sampler_id in released.sampler_ids:
                self._on_released(sampler_id)
            for folder in released.folders:
                await remove_folder(self._settings, folder)
            return len(released.sampler_ids)

        return await self._in_batches(batch)

    async def delete_losses(self) -> int:
        """Custom losses of sessions that have ended; operations carry theirs with them."""
        kept_s = self._settings.result_retention_s
        return await self._in_batches(lambda: self._rows.delete_losses(_over(kept_s)))

    async def _in_batches(self, batch: Callable[[], Awaitable[int]]) -> int:
        """All there is, leaving the writer to others between two batches of whichever kind."""
        total = 0
        while True:
            found = await self.pace.batch(batch)
            total += found
            if found < _BATCH:
                return total


def _over(seconds: float) -> Batch:
    return Batch(time.time() - seconds, _BATCH)
