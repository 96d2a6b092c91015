"""Which runs are in an engine's memory, and who leaves for whom when there is not room for all.

Pure bookkeeping, as the queues are, and forgotten with them. A run that has left loses nothing: its log brings it back
when it has something to do. Runs that have nothing to do leave first, the least recently used one before the others.
When all have work they take turns: a run leaves for one that waits no oftener than that changing places takes a tenth
of the time, so a turn lasts longer where coming back is slow.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gateway.dispatch.run_queue import Turns

log = logging.getLogger(__name__)

_IDLE_S = 1.0
"""Seconds after its last operation from which a run leaves at once for one that waits."""
_TURN = 9.0
"""The time between two changes of places, in times that a change takes."""
_SHORTEST_TURN_S, _LONGEST_TURN_S = 0.05, 30.0
_FIRST_GUESS_S = 0.02
"""Seconds that a change of places takes, before one has been measured."""
_LOOK_AGAIN_S = 0.02
_SIZES = 10_000
"""Runs whose size is remembered when they have left; the engine tells it again of any other."""


@dataclass(slots=True)
class Place:
    """A run in memory, or, until it is `filled`, on its way there. Times are of the clock given to Residency."""

    owner: str
    size: int
    filled: bool = False
    pending: bool = False
    """Whether it has gradients that no step has used: it comes back more slowly than from between two steps."""
    since: float = 0.0
    used_at: float = 0.0


class Change(NamedTuple):
    """A run that gets a place, and the runs that leave for it."""

    run_id: str
    leaving: list[str]


class Residency:
    """The places of one engine. `limit` in bytes; 0 is none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.limit = 0
        self.used = 0
        self.evictions = 0
        self.restores = 0
        self._stale: set[str] = set()
        self._places: OrderedDict[str, Place] = OrderedDict()
        self._held: Counter[str] = Counter()
        self._sizes: dict[str, int] = {}
        self._line = Turns()
        self._change_s = _FIRST_GUESS_S
        self._changed_at = -_LONGEST_TURN_S
        self._waiting_since = 0.0

    def __len__(self) -> int:
        """How many runs are in memory."""
        return sum(place.filled for place in self._places.values())

    def reset(self) -> None:
        """Forget everything; what the engine may still hold is told by `begin`."""
        self._stale.update(self._places)
        self._places.clear()
        self._held.clear()
        self._line = Turns()
        self.used = 0

    def begin(self, limit: int) -> list[str]:
        """An engine, perhaps the one before, is fed from now on: the runs that it has to drop first."""
        self.limit = limit
        stale, self._stale = sorted(self._stale), set()
        return stale

    def holds(self, run_id: str) -> bool:
        """Whether a run is in memory."""
        place = self._places.get(run_id)
        return place is not None and place.filled

    @property
    def runs(self) -> list[str]:
        """The runs in memory."""
        return [run_id for run_id, place in self._places.items() if place.filled]

    @property
    def waiting(self) -> int:
        """Runs that have something to do and no place."""
        return len(self._line)

    @property
    def look_again_s(self) -> float:
        """Seconds after which somebody may leave, though nothing else happens."""
        return _LOOK_AGAIN_S if self._line else float("inf")

    # ------------------------------------------------------------------ coming

    def claim(self, run_id: str, owner: str) -> bool:
        """Whether a run has a place, a free one if need be; if not, it waits in line now."""
        if run_id in self._places:
            return True
        if not self._line and self._missing(run_id) <= 0:
            self._reserve(run_id, owner)
            return True
        if not self._line:
            self._waiting_since = self._clock()
        self._line.add(owner, run_id)
        return False

    def fill(self, run_id: str, size: int | None) -> None:
        """A run with a place is complete; `size` in bytes, where the engine has told it."""
        place = self._places[run_id]
        if size is not None:
            self.used += size - place.size
            place.size = size
            self._remember(run_id, size)
        place.filled = True
        place.since = place.used_at = self._clock()
        self._places.move_to_end(run_id)

    def restored(self, run_id: str, size: int | None, seconds: float, *, pending: bool) -> None:
        """The same for a run that came back, which took so long, with the copy of another that left."""
        self.fill(run_id, size)
        self._places[run_id].pending = pending
        self.restores += 1
        self._change_s += 0.3 * (seconds - self._change_s)

    def refused(self, run_id: str, size: int) -> bool:
        """The engine has no room for a run of this size; whether that may change when others leave.

        If there should have been room, the engine has less than it thought, and others leave from now on as if its
        limit were what it has now.
        """
        self._remember(run_id, size)
        self.leave(run_id)
        if self._places and self._missing(run_id) <= 0:
            log.warning("run %s of %d bytes does not fit beside %d bytes of others", run_id, size, self.used)
            self.limit = self.used + size - 1
        return bool(self._places)

    # ------------------------------------------------------------------ staying

    def use(self, run_id: str, kind: str) -> None:
        """An operation of a run in memory has taken effect."""
        place = self._places.get(run_id)
        if place is not None:
            place.used_at = self._clock()
            self._places.move_to_end(run_id)
            if kind in ("forward_backward", "optim_step", "load_weights"):
                place.pending = kind == "forward_backward"

    # ------------------------------------------------------------------ leaving

    def leave(self, run_id: str) -> bool:
        """A run has no place any more; whether it had one."""
        place = self._places.pop(run_id, None)
        if place is None:
            return False
        self.used -= place.size
        self._held[place.owner] -= 1
        return True

    def change(self, busy: Callable[[str], bool], engine_idle: bool) -> Change | None:
        """The next change of places: owners take turns, but who has nothing in memory need not wait for others' turns.
        None when nobody waits, or nobody leaves yet.

        `busy` says of a run whether it has something to do, `engine_idle` whether none in memory has.
        """
        in_line = list(self._line.owners())
        newcomer = next((owner for owner in in_line[1:] if not self._held[owner]), None)
        for owner in [*in_line[:1], *([newcomer] if newcomer is not None else [])]:
            leaving = self._leaving(self._line.first(owner), owner, busy, engine_idle)
            if leaving is not None:
                if leaving and owner is not newcomer:
                    self._changed_at = self._clock()
                return self._exchange(owner, leaving)
        return None

    def _exchange(self, owner: str, leaving: list[str]) -> Change:
        run_id = self._line.take(owner) or ""
        for each in leaving:
            self.leave(each)
            self.evictions += 1
        self._reserve(run_id, owner)
        return Change(run_id, leaving)

    def _leaving(
        self, run_id: str, owner: str, busy: Callable[[str], bool], engine_idle: bool
    ) -> list[str] | None:
        """Who makes room for a run; None when not enough may leave now."""
        missing = self._missing(run_id)
        leaving: list[str] = []
        candidates = self._candidates(owner, busy, engine_idle)
        while missing > 0:
            candidate = next(candidates, None)
            if candidate is None:
                return None
            leaving.append(candidate)
            missing -= self._places[candidate].size
        return leaving

    def _candidates(self, owner: str, busy: Callable[[str], bool], engine_idle: bool) -> Iterator[str]:
        """Runs that may leave for one of `owner` now, best first."""
        now = self._clock()
        turn_s = min(max(_TURN * self._change_s, _SHORTEST_TURN_S), _LONGEST_TURN_S)
        over = now - self._changed_at >= turn_s
        overdue = over and now - max(self._changed_at + turn_s, self._waiting_since) >= turn_s
        newcomer = not self._held[owner]
        filled = {run_id: place for run_id, place in self._places.items() if place.filled}
        working = [run_id for run_id in filled if busy(run_id)]
        for run_id in [run_id for run_id in filled if not busy(run_id)]:
            quiet_s = now - filled[run_id].used_at
            if over or quiet_s >= _IDLE_S or (engine_idle and quiet_s >= self._change_s):
                yield run_id
        working.sort(key=lambda run_id: self._claim_to_stay(filled[run_id]))
        for run_id in working:
            place = filled[run_id]
            if (over or (newcomer and self._held[place.owner] > 1)) and (overdue or not place.pending):
                yield run_id

    def _claim_to_stay(self, place: Place) -> tuple[bool, int, float]:
        """Between two steps before in the middle of one, of who has many before who has few, long before short."""
        return place.pending, -self._held[place.owner], place.since

    def _reserve(self, run_id: str, owner: str) -> None:
        """A place for a run that is on its way; what is not known of its size the engine tells."""
        size = self._sizes.get(run_id, 0)
        self._places[run_id] = Place(owner, size)
        self._held[owner] += 1
        self.used += size

    def _remember(self, run_id: str, size: int) -> None:
        self._sizes.pop(run_id, None)
        self._sizes[run_id] = size
        if len(self._sizes) > _SIZES:
            del self._sizes[next(iter(self._sizes))]

    def _missing(self, run_id: str) -> int:
        """Bytes that must become free before the run fits. In an empty engine it may try: nobody can leave for it."""
        if not self.limit or not self._places:
            return 0
        return self.used + self._sizes.get(run_id, 0) - self.limit
