"""How many CPU threads a pass is computed with."""

from __future__ import annotations

import torch

WORTH_SHARING = 2**28
"""Multiply-adds of a pass from which threads bring more than their meeting after each layer costs: measured on two
cores, a decoding step of 1.4 M weights is 1.2 to 2 times slower on two threads with 1 to 32 rows, one of 34 M weights
1.15 times slower with 4 rows and 1.17 times faster with 16."""


class Threads:
    """The threads of this process: `limit` for large passes, one for small ones.

    The last bits of a sum depend on the count, so it is a function of the pass alone, never of what ran before.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        torch.set_num_threads(limit)

    def share(self, weights: int, rows: int) -> None:
        """What follows is a pass of `rows` rows through so many weights."""
        self._use(self.limit if weights * rows >= WORTH_SHARING else 1)

    def share_all(self) -> None:
        """What follows is no pass: it takes all threads."""
        self._use(self.limit)

    def _use(self, count: int) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
