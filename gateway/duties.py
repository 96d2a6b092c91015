"""What a gateway does in the background, now and then: each duty has a lease in the database, so that of several
gateways one performs it.

An error ends a round and nothing else: it is logged, kept for the admin API, and the next round tries again. A duty
works in small steps, and does no harm when it is cut off between two of them or performed by two gateways at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

from gateway.checkpoints import delete_expired
from gateway.errors import StoreUnavailable
from gateway.retention import Retention
from gateway.settings import Settings
from gateway.snapshot_duties import STRAY_S, prune_inputs, remove_needless, remove_strays
from gateway.snapshot_files import SnapshotFiles
from gateway.store import Store
from gateway.store.duties import DutyLease, DutyReport
from gateway.sweeping import sweep
from gateway.troubles import Trouble

log = logging.getLogger(__name__)


_SELDOM = 60
"""Rounds of other duties for one of what has to look at every folder."""


_FAREWELL_S = 1.0
"""Seconds that a stop waits for a database that does not answer; the lease runs out by itself."""


class DutyTakenOver(Exception):
    """Another gateway performs a duty, for this one has been silent for longer than its lease."""


@dataclass(frozen=True, slots=True)
class Duty:
    """Something to do every `every_s` seconds; `run` answers how many things it has done. What is not `shared` every
    gateway does for itself, without a lease: it is about its own memory."""

    name: str
    every_s: float
    run: Callable[[], Awaitable[int]]
    shared: bool = True


def standing_duties(store: Store, settings: Settings, retention: Retention) -> list[Duty]:
    """Those that every gateway has."""
    every_s = settings.duty_s
    files, keep_s = SnapshotFiles(settings), settings.snapshot_keep_s
    return [
        Duty("expired checkpoints", every_s, partial(delete_expired, store, settings)),
        Duty("silent sessions", every_s, retention.end_silent_sessions),
        Duty("idle runs of ended sessions", every_s, retention.drop_idle_runs, shared=False),
        Duty("old results", every_s, retention.delete_results),
        Duty("old calls", every_s, retention.delete_futures),
        Duty("unnamed weights", every_s, retention.release_weights),
        Duty("stray folders", _SELDOM * every_s, partial(sweep, store, settings)),
        Duty(
            "unused copies", every_s, partial(asyncio.to_thread, settings.storage.drop_unused), shared=False
        ),
        Duty("losses of ended sessions", every_s, retention.delete_losses),
        Duty("inputs behind snapshots", every_s, partial(prune_inputs, store, retention.pace)),
        Duty("older snapshots", every_s, partial(remove_needless, store, files, keep_s, retention.pace)),
        Duty("stray snapshots", STRAY_S, partial(remove_strays, store, files)),
    ]


class Duties:
    """The duties of one gateway process, `holder` of their leases of `lease_s` seconds."""

    def __init__(self, store: Store, holder: str, lease_s: float, duties: Iterable[Duty] = ()) -> None:
        self._store = store
        self._holder = holder
        self._lease_s = lease_s
        self._duties = list(duties)
        self._trouble = Trouble(log, "duties are performed again")
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, duty: Duty) -> None:
        """One more, before they are started."""
        self._duties.append(duty)

    def start(self) -> None:
        """Start performing them; call it in the running loop."""
        self._tasks = [
            asyncio.create_task(self._perform_forever(duty), name=duty.name) for duty in self._duties
        ]

    async def stop(self) -> None:
        """Perform them no longer; what is under way is left to the next round, here or elsewhere."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _perform_forever(self, duty: Duty) -> None:
        while True:
            wait = await self._round(duty)
            await asyncio.sleep(wait)

    async def _round(self, duty: Duty) -> float:
        """Perform a duty if it is due and nobody else does; seconds until it may be due again."""
        lease = DutyLease(duty.name, self._holder, duty.every_s, self._lease_s)
        try:
            if not duty.shared:
                await duty.run()
                return duty.every_s
            wait = await self._store.duties.take(lease)
            if wait == 0:
                await self._store.duties.report(await self._reported(duty, lease))
            self._trouble.succeeded()
        except DutyTakenOver:
            log.warning("duty %r has been taken over by another gateway", duty.name)
        except StoreUnavailable as error:  # the same for all of them, and they come again
            self._trouble.failed(f"duties cannot be performed: {error}")
        except (
            Exception
        ) as error:  # boundary: the database knows of no such round; the next one comes in its time
            log.warning("duty %r could not be performed: %s", duty.name, error)
        else:
            return wait or duty.every_s
        return duty.every_s

    async def _reported(self, duty: Duty, lease: DutyLease) -> DutyReport:
        """A round of a duty that this gateway holds the lease of. Raises DutyTakenOver."""
        began = time.monotonic()
        try:
            done = await self._under_lease(duty, lease)
        except DutyTakenOver:
            raise
        except asyncio.CancelledError:
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    await self._store.duties.give_back(lease)
            raise
        except StoreUnavailable as error:
            self._trouble.failed(f"duties cannot be performed: {error}")
            return DutyReport(lease, time.monotonic() - began, error=str(error))
        except (
            Exception
        ) as error:  # boundary: the next round tries again; the log and the row say what it was
            log.exception("duty %r failed", duty.name)
            return DutyReport(lease, time.monotonic() - began, error=f"{type(error).__name__}: {error}")
        if done:
            log.info("duty %r: %d done in %.1f s", duty.name, done, time.monotonic() - began)
        return DutyReport(lease, time.monotonic() - began, done)

    async def _under_lease(self, duty: Duty, lease: DutyLease) -> int:
        """Perform a duty, renewing its lease as long as it takes."""
        work = asyncio.ensure_future(duty.run())
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=self._lease_s / 3)
                if not work.done() and not await self._store.duties.renew(lease):
                    raise DutyTakenOver
            return work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
