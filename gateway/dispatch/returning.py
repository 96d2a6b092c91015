"""Runs on their way back into the engine, a step at a time, and what becomes of operations whose run cannot come."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Protocol

from gateway.dispatch.blame import Blame
from gateway.dispatch.outcomes import failed
from gateway.dispatch.recovery import NoRoom, Restoration, RestoreFailed
from gateway.dispatch.residency import Residency
from gateway.dispatch.snapshots import Snapshots
from gateway.engine_process import EngineProcess
from gateway.snapshot_files import SnapshotFiles, SnapshotsUnreachable
from gateway.store import Store
from gateway.store.records import Future, Outcome

log = logging.getLogger(__name__)

_TRIES = 3
_AGAIN_S = 0.25
"""Seconds before a restoration that failed is tried again; doubles with each try."""
_LONGEST_PAUSE_S = 10.0
"""Seconds between two looks at a storage of snapshots that is out of reach, at most."""


class Lane(Protocol):
    """Where the operations wait that runs come back for."""

    def put_back(self, future: Future) -> None:
        """What was taken is still to be done."""

    def refused(self, future: Future, size: int) -> None:
        """The engine has no room for the run, of `size` bytes."""

    def settle(self, outcome: Outcome) -> None:
        """Store an outcome."""

    async def require_settled(self) -> None:
        """Wait until every outcome that was handed to the database is in it."""


class Returning:
    """The runs that the engine lacks and that have something to do."""

    def __init__(
        self,
        store: Store,
        files: SnapshotFiles,
        snapshots: Snapshots,
        residency: Residency,
        blame: Blame,
        lane: Lane,
    ) -> None:
        self._store = store
        self._files = files
        self._snapshots = snapshots
        self._residency = residency
        self._blame = blame
        self._lane = lane
        self._restorations: dict[str, Restoration] = {}
        self._failures: dict[str, int] = {}
        self._outages: dict[str, float] = {}
        self._resets = 0

    def reset(self) -> None:
        """Forget everything; what waits to be tried again is queued anew by whoever resets."""
        self._resets += 1
        for restoration in self._restorations.values():
            restoration.cancel()
        self._restorations.clear()
        self._failures.clear()
        self._outages.clear()

    def waits_for_storage(self, run_id: str) -> bool:
        """Whether the storage of a run's snapshots is out of reach."""
        return run_id in self._outages

    async def advance(self, engine: EngineProcess, future: Future) -> None:
        """Take a step of building the run again; the operation keeps its place at the head of the run."""
        run_id = future.run_id or ""
        restoration = self._restorations.get(run_id) or await self._begin(future)
        if restoration is None:
            return
        try:
            complete = await restoration.step(engine)
        except NoRoom as refusal:
            del self._restorations[run_id]
            self._lane.refused(future, refusal.size)
            return
        except (RestoreFailed, SnapshotsUnreachable) as error:
            del self._restorations[run_id]
            self._residency.leave(run_id)
            await engine.drop_run(run_id)
            if isinstance(error, RestoreFailed):
                self._failed(future, error)
            else:
                self._out_of_reach(future)
            return
        if complete:
            self._complete(run_id, restoration)
        self._lane.put_back(future)

    async def _begin(self, future: Future) -> Restoration | None:
        """None: something has to be waited for first, after which the operation is queued again."""
        run_id = future.run_id or ""
        if (left := self._snapshots.left(run_id)) is not None:
            left.add_done_callback(partial(self._after, self._resets, future))
            return None
        await self._lane.require_settled()
        restoration = Restoration(self._store, self._files, run_id, future.seq_id)
        self._restorations[run_id] = restoration
        if (fetching := restoration.fetch()) is not None:
            fetching.add_done_callback(partial(self._after, self._resets, future))
            return None
        return restoration

    def _complete(self, run_id: str, restoration: Restoration) -> None:
        del self._restorations[run_id]
        self._failures.pop(run_id, None)
        self._outages.pop(run_id, None)
        self._blame.restored(run_id)
        pending = not restoration.progress.boundary
        seconds = restoration.seconds + self._snapshots.writing_s  # somebody has left for it
        self._residency.restored(run_id, restoration.size, seconds, pending=pending)
        self._snapshots.begin(run_id, restoration.progress)

    def _failed(self, future: Future, error: RestoreFailed) -> None:
        """What may pass (no memory beside the other runs, say) is tried again a few times, then it fails."""
        run_id = future.run_id or ""
        self._outages.pop(run_id, None)
        tries = self._failures[run_id] = self._failures.get(run_id, 0) + 1
        if not error.passing or tries >= _TRIES:
            del self._failures[run_id]
            self._lane.settle(failed(future, error.category, str(error)))
            return
        log.warning("run %s: try %d: %s", run_id, tries, error)
        self._try_later(future, _AGAIN_S * 2**tries)

    def _out_of_reach(self, future: Future) -> None:
        """An outage of the storage says nothing about the run: its operation waits as long as that lasts."""
        run_id = future.run_id or ""
        pause_s = self._outages[run_id] = min(2 * self._outages.get(run_id, _AGAIN_S), _LONGEST_PAUSE_S)
        self._try_later(future, pause_s)

    def _try_later(self, future: Future, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._try_again, self._resets, future)

    def _after(self, resets: int, future: Future, _: asyncio.Future[None]) -> None:
        self._try_again(resets, future)

    def _try_again(self, resets: int, future: Future) -> None:
        if resets == self._resets:  # else memory has been rebuilt meanwhile, and the operation is queued anew
            self._lane.put_back(future)
