"""Bounds of what waits for an engine, and the bytes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gateway.errors import TooManyRequests
from gateway.settings import Settings
from gateway.store.records import Future

_FOR_WHAT_IS_AWAITED = 2
"""How far over a bound calls are taken that others wait for; beyond, a client could name a high number first and fill
everything with what comes before it. What waits fails when its gap is given up."""


class Load(NamedTuple):
    """How much waits of what has a bound; `setting` is its name."""

    waiting: int
    most: int
    what: str
    setting: str


def run_load(run_id: str, waiting: int, settings: Settings) -> Load:
    what = f"operations of run {run_id}"
    return Load(waiting, settings.max_queued_per_run, what, "max_queued_per_run")


def owner_load(waiting: int, settings: Settings) -> Load:
    return Load(waiting, settings.max_queued_per_owner, "operations of yours", "max_queued_per_owner")


def samples_load(waiting: int, settings: Settings) -> Load:
    return Load(waiting, settings.max_queued_samples, "samples of yours", "max_queued_samples")


def bytes_load(waiting: int, settings: Settings) -> Load:
    return Load(waiting, settings.max_queued_bytes, "bytes of calls of yours", "max_queued_bytes")


def require_room(loads: Iterable[Load], awaited: Callable[[], bool]) -> None:
    """Raises TooManyRequests when one of the bounds has been reached. `awaited` says whether the call comes before
    something that waits: such a one is taken up to twice the bound.

    A call is refused for what waits already, not for its own size: one that is larger than the bound is taken by an
    empty queue, for no repetition would make it smaller.
    """
    for load in loads:
        if load.waiting < load.most or (load.waiting < _FOR_WHAT_IS_AWAITED * load.most and awaited()):
            continue
        raise TooManyRequests(
            f"{load.waiting} {load.what} wait already (setting {load.setting}); retry when some are done"
        )


class QueuedBytes:
    """Bytes of the inputs of calls that have no outcome yet, by owner."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[str, int]] = {}
        self._of: Counter[str] = Counter()

    def of(self, owner: str) -> int:
        """Bytes of all that an owner has here."""
        return self._of[owner]

    def add(self, future: Future) -> None:
        """An open call; one that is here already counts once."""
        if future.open and future.request_id not in self._sizes:
            self._sizes[future.request_id] = future.owner, future.input_bytes
            self._of[future.owner] += future.input_bytes

    def remove(self, request_id: str) -> None:
        """A call has its outcome; one that is not here changes nothing."""
        if (known := self._sizes.pop(request_id, None)) is not None:
            owner, size = known
            self._of[owner] -= size
            if not self._of[owner]:
                del self._of[owner]

    def clear(self) -> None:
        """Forget everything."""
        self._sizes.clear()
        self._of.clear()
