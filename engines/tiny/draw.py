"""Random choices that keep count of how surprising they were.

Every choice of the corpus goes through one `Draw`, so the information that went into a text is known exactly. It bounds
the text's entropy from above (two ways of drawing may give the same text), which tells how good a model can become.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A seeded source of choices; `nats` is the information of all choices so far, -ln of their joint probability.

    Only `random.Random.random` is used: its sequence for a seed is the same in every Python version.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.nats = 0.0

    def number(self, low: int, high: int) -> int:
        """A whole number, low <= n <= high, all equally likely."""
        count = high - low + 1
        self.nats += math.log(count)
        return low + int(self._random.random() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely; they must not be empty."""
        return items[self.number(0, len(items) - 1)]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order; there must be at least as many."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]

    def chance(self, probability: float) -> bool:
        """True with this probability, 0 < probability < 1."""
        happens = self._random.random() < probability
        self.nats -= math.log(probability if happens else 1.0 - probability)
        return happens

    def weighted(self, items: Sequence[tuple[float, T]]) -> T:
        """One of the items, each (weight, item) in proportion to its weight, weights > 0."""
        total = sum(weight for weight, _ in items)
        rest, index = self._random.random() * total - items[0][0], 0
        while rest >= 0 and index + 1 < len(items):
            index += 1
            rest -= items[index][0]
        weight, item = items[index]
        self.nats -= math.log(weight / total)
        return item
