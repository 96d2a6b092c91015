"""How many CPU threads a pass is computed with, and when passes are computed side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

WORTH_SHARING = 2**28
"""Multiply-adds of a pass from which threads bring more than their meeting after each layer costs: measured on two
cores, a decoding step of 1.4 M weights is 1.2 to 2 times slower on two threads with 1 to 32 rows, one of 34 M weights
1.15 times slower with 4 rows and 1.17 times faster with 16."""
MOST_LANES = 4
"""What is between the operations of lanes is Python, of which one thread at a time runs."""
EVEN = 1.1
"""What the largest lane may be of their mean: its end is waited for, with the threads of the others doing nothing."""

Result = TypeVar("Result")


class Threads:
    """The threads of this process: `limit` for large passes, one for small ones.

    The last bits of a sum depend on the count, so it is a function of the pass alone, never of what ran before. Of a
    lane, whose passes run beside those of others, it is the lane's part.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lane = _Lane()
        self._pool: ThreadPoolExecutor | None = None
        torch.set_num_threads(limit)

    def share(self, weights: int, rows: int) -> None:
        """What follows is a pass of `rows` rows through so many weights."""
        self._use((self._lane.limit or self.limit) if weights * rows >= WORTH_SHARING else 1)

    def share_all(self) -> None:
        """What follows is no pass: it takes all threads."""
        self._use(self.limit)

    def lanes(self, weights: int, sizes: Sequence[int]) -> list[list[int]]:
        """Positions of works of so many rows each, in lanes that are about as long: threads that compute one operation
        each never wait for one another, those that share it meet after each. One lane where works are too few, too
        small or too different."""
        most = min(self.limit, MOST_LANES, len(sizes), weights * sum(sizes) // WORTH_SHARING)
        for count in range(most, 1, -1):
            lanes, rows = _spread(sizes, count)
            if max(rows) * count <= EVEN * sum(rows):
                return lanes
        return [list(range(len(sizes)))]

    def side_by_side(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """The result of each, which has a thread and an equal part of the limit to itself. Raises the first error once
        all have ended."""
        if len(works) == 1:
            return [works[0]()]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_LANES, thread_name_prefix="lane")
        limit = self.limit // len(works)
        under_way = [self._pool.submit(self._in_lane, limit, work) for work in works]
        wait(under_way)
        return [each.result() for each in under_way]

    def close(self) -> None:
        """End the threads of lanes."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _in_lane(self, limit: int, work: Callable[[], Result]) -> Result:
        self._lane.limit = limit
        self._use(limit)
        return work()

    def _use(self, count: int) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


class _Lane(threading.local):
    """What this thread may use, if it computes a lane."""

    limit: int | None = None


def _spread(sizes: Sequence[int], count: int) -> tuple[list[list[int]], list[int]]:
    """Largest first, each to the lane with least; gives the lanes, positions in their order, and the rows of each."""
    lanes: list[list[int]] = [[] for _ in range(count)]
    rows = [0] * count
    for position in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = rows.index(min(rows))
        lanes[least].append(position)
        rows[least] += sizes[position]
    return [sorted(lane) for lane in lanes], rows
