"""How many replicas of a sampling engine there may be, and what makes it more or fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

LARGEST = 64
"""Replicas of one engine."""


class ReplicaBounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the number of an engine's replicas; equal ones fix it."""

    min: int
    """As many there are, also when there is nothing to do."""
    max: int
    """As many there are at most."""
    samples_each: int = 64
    """Open samples (waiting or being drawn) for each replica; with more, there is one more replica."""
    idle_s: float = 60.0
    """Seconds for which fewer would have been enough before there are fewer."""

    def enough(self, samples: int) -> int:
        """How many replicas so many open samples ask for, within the bounds."""
        return self.within(math.ceil(samples / self.samples_each))

    def within(self, number: int) -> int:
        """The number within the bounds that is next to `number`."""
        return min(max(number, self.min), self.max)


def problem_of(bounds: ReplicaBounds, devices: Sequence[str], *, trains: bool) -> str | None:
    """What is wrong with the replicas of an engine, as the end of a sentence; None: nothing."""
    if not 1 <= bounds.min <= bounds.max <= LARGEST:
        return f"min is {bounds.min} and max is {bounds.max}; they must be 1 <= min <= max <= {LARGEST}"
    if bounds.samples_each < 1:
        return f"samples_each is {bounds.samples_each}; it must be at least 1"
    if not 0 <= bounds.idle_s < math.inf:
        return f"idle_s is {bounds.idle_s}; it must be a number of seconds, at least 0"
    if trains and bounds.max > 1:
        return f'max is {bounds.max}; more than one needs roles = ["sample"], for a run is in one engine only'
    if 0 < len(devices) < bounds.max:
        return f"max is {bounds.max}, but there are devices for {len(devices)}, and each needs its own"
    return None
