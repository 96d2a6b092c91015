"""Samples that wait for a slot: whose party has the fewest sequences under way is next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the line knows of a sample."""

    call_id: int
    party: str


Sample = TypeVar("Sample", bound=Waiting)


class Line(Generic[Sample]):
    """The waiting samples, each party's in order. Ties go round, so that parties with equal shares take turns."""

    def __init__(self) -> None:
        self._parties: dict[str, deque[Sample]] = {}

    def __iter__(self) -> Iterator[Sample]:
        return (sample for samples in self._parties.values() for sample in samples)

    def add(self, sample: Sample) -> None:
        """To the end of its party's line."""
        self._parties.setdefault(sample.party, deque()).append(sample)

    def remove(self, call_id: int) -> None:
        """Forget a sample, if it waits."""
        for party in list(self._parties):
            self._replace(party, deque(s for s in self._parties[party] if s.call_id != call_id))

    def next_party(self, running: Counter[str]) -> str | None:
        """Whose turn it is, by the sequences that each party has under way; None when nobody waits."""
        return min(self._parties, key=running.__getitem__, default=None)

    def take(self, party: str) -> Sample:
        """The first sample of a party, which goes behind the others with an equal share."""
        samples = self._parties.pop(party)
        first = samples.popleft()
        self._replace(party, samples)
        return first

    def put_back(self, samples: Sequence[Sample]) -> None:
        """Samples that were taken and could not begin come first again, in their order."""
        for sample in reversed(samples):
            self._parties.setdefault(sample.party, deque()).appendleft(sample)

    def _replace(self, party: str, samples: deque[Sample]) -> None:
        if samples:
            self._parties[party] = samples
        else:
            self._parties.pop(party, None)
