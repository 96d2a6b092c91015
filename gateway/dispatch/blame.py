"""Who is blamed for an engine's death, and what becomes of it.

An engine says what it is in the middle of (`engines.vitals`): a call, a replay, a decoding step. Only what was under
way is counted, and an operation fails only when it was alone in what killed the engine. So nothing fails because of
what it ran beside, and a death between two calls is nobody's fault.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Collection

from engines.vitals import Doing, Signs
from gateway.dispatch.outcomes import failed
from gateway.store.records import Future, Outcome

log = logging.getLogger(__name__)

_FEW = 8
"""As many samples of one step are repeated one by one after its first death, so that the second one finds the guilty.
Of more, all are repeated together first: most deaths are nobody's fault, and hundreds one by one would take long."""
_SUSPECT = 2
"""Deaths after which one of many samples is repeated alone."""
_ENOUGH = 5
"""Deaths over which a call fails also when it has never been alone: requests that are not stored keep it company."""
_RESTORATIONS = 5
"""Engines that may die over one operation of a restoration: it was performed before, so that it is suspected late."""


class Blame:
    """The deaths of one engine, as long as this gateway runs. How often an engine died over a future is in the database
    too; what is only here costs a restarted gateway one more death."""

    def __init__(self, most_deaths: int) -> None:
        self._most_deaths = most_deaths
        self._few: set[str] = set()
        self._alone: set[str] = set()
        self._replays: Counter[tuple[str, int]] = Counter()
        self._given_up: dict[str, str] = {}

    def died_restoring(self, signs: Signs, run_id: str) -> None:
        """An engine is lost that showed these signs; the log of a run was being applied again."""
        if signs.doing is not Doing.REPLAYING:
            return
        self._replays[run_id, signs.seq_id] += 1
        deaths = self._replays[run_id, signs.seq_id]
        if deaths >= _RESTORATIONS:
            self._given_up[run_id] = (
                f"run {run_id} cannot be restored: the engine died {deaths} times while it applied operation "
                f"{signs.seq_id} again; begin a new run at its last checkpoint"
            )

    def died(self, signs: Signs, call: Collection[str], samples: Collection[str], drawn: int) -> list[str]:
        """An engine is lost that showed these signs: the futures over which it died.

        `call` and `samples` are the futures in it, `drawn` is the number of all samples, stored or not.
        """
        under_way = {Doing.TRAINING: (call, len(call)), Doing.SAMPLING: (samples, drawn)}
        blamed, together = under_way.get(signs.doing, ((), 0))
        if together == 1:
            self._alone.update(blamed)
        else:
            self._alone.difference_update(blamed)
        if together <= _FEW:
            self._few.update(blamed)
        return list(blamed)

    def suspected(self, future: Future) -> bool:
        """Whether engines have died over it so that it has to run alone."""
        return future.deaths >= _SUSPECT or (future.run_id is None and future.request_id in self._few)

    def worn_out(self, future: Future) -> Outcome | None:
        """A call that engines keep dying over fails, so that everything else can go on."""
        if future.run_id in self._given_up:
            return _failure(future, self._given_up[future.run_id])
        alone = future.request_id in self._alone
        if future.deaths < self._most_deaths or not (alone or future.deaths >= _ENOUGH):
            return None
        return _failure(future, _told(future.deaths))

    def restored(self, run_id: str) -> None:
        """A run is complete again: what killed engines on the way there was something else."""
        for key in [key for key in self._replays if key[0] == run_id]:
            del self._replays[key]


class Deaths:
    """Those over one sample that is not stored, by the same rules."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._number = 0
        self._alone = self._few = False

    def count(self, signs: Signs, drawn: int) -> None:
        """An engine is lost that had it among `drawn` samples, and showed these signs."""
        if signs.doing is Doing.SAMPLING:
            self._number += 1
            self._alone = drawn == 1
            self._few = self._few or drawn <= _FEW

    @property
    def suspected(self) -> bool:
        """Whether it is to be drawn apart from others like it."""
        return self._number >= _SUSPECT or self._few

    @property
    def worn_out(self) -> bool:
        """Whether it fails."""
        return self._number >= self._most and (self._alone or self._number >= _ENOUGH)

    @property
    def told(self) -> str:
        """What has happened, for who asked."""
        return _told(self._number)


def _told(deaths: int) -> str:
    times = "once" if deaths == 1 else f"{deaths} times"
    return f"the engine died {times} while it performed this operation"


def _failure(future: Future, cause: str) -> Outcome:
    error_id = secrets.token_hex(6)
    log.error("error %s: %s failed: %s", error_id, future.request_id, cause)
    return failed(future, "server", cause, error_id)
