"""Which owner is next, so that each gets as much of an engine as the others while all have work."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count


class Shares:
    """What each owner has been given, in calls of the engine.

    Of those who have work the one who has been given least comes next, whatever its operation weighs, and pays for it
    afterwards: deficit round robin (Shreedhar & Varghese 1995) without saving up for a turn, in the order of start-time
    fair queueing (Goyal, Vin & Cheng 1996). So who comes to an engine that others keep busy is next, and who stays away
    saves nothing: all who wait have at least `_now`, and whoever comes begins there.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._now = 0.0
        self._line: list[tuple[float, int, str]] = []
        self._places = count()

    def begin(self, owners: Iterable[str]) -> None:
        """These have work for the call that is being put together; ties go by their order."""
        self._given = {owner: given for owner, given in self._given.items() if given > self._now}
        self._line = [(self._of(owner), next(self._places), owner) for owner in owners]
        heapq.heapify(self._line)

    def next(self) -> str | None:
        """Whose turn it is; that owner leaves the line."""
        return heapq.heappop(self._line)[2] if self._line else None

    def charge(self, owner: str, weight: float) -> None:
        """An owner whose turn it was has been given so much of a call."""
        self._now = self._of(owner)
        self._given[owner] = self._now + weight

    def again(self, owner: str) -> None:
        """An owner has more work; it stands behind those who have been given as much."""
        heapq.heappush(self._line, (self._of(owner), next(self._places), owner))

    def _of(self, owner: str) -> float:
        return max(self._given.get(owner, 0.0), self._now)
