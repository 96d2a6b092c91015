"""When what happens: drawn from a seed, written down as it happens, and how long each client paused for it."""

from __future__ import annotations

import json
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.faults.breaking import Fault
from tests.faults.scene import Scene
from tests.faults.workload import CLIENTS, Journal

_LONGEST_REST_S = 1.2
_RECOVERED_WITHIN_S = 90.0
_FELT_WITHIN_S = 1.0
"""Seconds after a fault in which a client may still get what was finished before."""
SEVERAL = "(one upon the other)"


class Stuck(Exception):
    """Clients got nothing for long after a fault."""


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault, and when it began and was over; `time.monotonic()` seconds."""

    kind: str
    began: float
    over: float


class Schedule:
    """Draws faults for a scene. After one in three it waits until every client has got something again, after another
    until one has; the third is followed by the next fault while recovery is under way."""

    def __init__(
        self, scene: Scene, faults: dict[str, Fault], seed: int, journal: Journal, log: Path
    ) -> None:
        self.happened: list[Happened] = []
        self._scene = scene
        self._faults = faults
        self._draw = random.Random(seed)
        self._journal = journal
        self._log = log

    def run(self, count: int, until: float, progress: Callable[[str], None]) -> None:
        """So many faults, or as many as there is time for. Raises Stuck."""
        kinds = list(self._faults)
        while len(self.happened) < count and time.monotonic() < until:
            kind = self._draw.choice(kinds)
            began, wall = time.monotonic(), time.time()
            if not self._faults[kind](self._scene, self._draw):
                time.sleep(0.05)
                continue
            over = time.monotonic()
            self.happened.append(Happened(kind, began, over))
            with self._log.open("a") as log:
                entry = {"number": len(self.happened), "at": wall, "kind": kind, "seconds": over - began}
                log.write(json.dumps(entry) + "\n")
            progress(f"{self._scene.kind.name}: {len(self.happened)} of {count}: {kind}")
            self._await_results(over, self._draw.choice([0, 1, CLIENTS]))
            time.sleep(self._draw.uniform(0.0, _LONGEST_REST_S))

    def _await_results(self, since: float, clients: int) -> None:
        """Until so many clients have got something again."""
        deadline = time.monotonic() + _RECOVERED_WITHIN_S
        while (served := sum(last > since for last in self._journal.last())) < clients:
            if time.monotonic() > deadline:
                raise Stuck(f"only {served} of {CLIENTS} clients got a result in {_RECOVERED_WITHIN_S:.0f} s")
            time.sleep(0.02)


def pauses(happened: list[Happened], journal: Journal) -> dict[str, list[float]]:
    """By kind, for every fault and client, the longest time without a result that the fault began in or was followed
    by. One that several faults share is nobody's alone: it counts, once, as of a kind of its own."""
    found: dict[str, list[float]] = {}
    for client in range(CLIENTS):
        times = journal.times(client)
        of_gap: dict[int, list[str]] = {}
        for fault in happened:
            first = bisect_left(times, fault.began) - 1
            last = bisect_left(times, fault.over + _FELT_WITHIN_S)
            gaps = range(max(first, 0), min(last, len(times) - 1))
            if gaps:
                longest = max(gaps, key=lambda index: times[index + 1] - times[index])
                of_gap.setdefault(longest, []).append(fault.kind)
        for index, kinds in of_gap.items():
            kind = kinds[0] if len(kinds) == 1 else SEVERAL
            found.setdefault(kind, []).append(times[index + 1] - times[index])
    return found


def table(pauses_of: dict[str, list[float]], happened: list[Happened]) -> list[str]:
    """Lines: kinds with their number, and the median and longest pause of a client."""
    lines = [f"{'fault':34}{'times':>6}{'median pause':>15}{'longest pause':>15}"]
    counted = Counter(fault.kind for fault in happened)
    for kind in [*sorted(counted), SEVERAL]:
        seen = pauses_of.get(kind)
        told = f"{median(seen):>13.2f} s{max(seen):>13.2f} s" if seen else f"{'-':>15}{'-':>15}"
        lines.append(f"{kind:34}{counted[kind] or '':>6}{told}")
    return lines
