"""Keys and values of prompts that have been run through the model, for later prompts that begin alike.

Nothing is shared beyond a sampling session and a version of its weights: neither numbers nor the time that they take
tell one session about another's prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.hf.kv_cache import Prefix

LEAST_TOKENS = 16
"""Shorter beginnings are computed again: a pass of their own for what follows costs more."""
LARGEST_MASK = 2**26
"""Items of the attention mask of what follows a beginning; a longer text is computed whole, without a mask."""
MOST_PROMPTS = 256

Key = tuple[str, str]
"""Sampling session and folder of the adapter; `""` is the base model."""


class _Prompt(NamedTuple):
    key: Key
    tokens: NDArray[np.int64]
    prefix: Prefix
    size: int


class PromptCache:
    """The prompts that were used last, as many as fit into so many bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()
        self._size = 0
        self._next = 0

    def find(self, key: Key, tokens: Sequence[int], most: int) -> tuple[int, Prefix | None]:
        """How many tokens, at most `most`, begin this prompt and another of the same key; and their numbers."""
        wanted = np.asarray(tokens, dtype=np.int64)
        shared = {place: _shared(prompt.tokens, wanted) for place, prompt in self._of(key)}
        place = max(shared, key=shared.__getitem__, default=None)
        length = 0 if place is None else min(shared[place], most)
        following = len(wanted) - length
        if place is None or length < LEAST_TOKENS or following * len(wanted) > LARGEST_MASK:
            return 0, None
        self._prompts.move_to_end(place)
        prefix = self._prompts[place].prefix
        return length, {
            layer: (keys[:, :, :length], values[:, :, :length]) for layer, (keys, values) in prefix.items()
        }

    def keep(self, key: Key, tokens: Sequence[int], prefix: Prefix) -> None:
        """Remember a prompt; those that it begins with are not needed any more."""
        size = sum(part.numel() * part.element_size() for parts in prefix.values() for part in parts)
        if len(tokens) < LEAST_TOKENS or size > self.capacity:
            return
        wanted = np.asarray(tokens, dtype=np.int64)
        for place, prompt in self._of(key):
            shared = _shared(prompt.tokens, wanted)
            if shared == len(wanted):
                self._prompts.move_to_end(place)
                return
            if shared == len(prompt.tokens):
                self._drop(place)
        own = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in prefix.items()}
        self._prompts[self._next] = _Prompt(key, wanted, own, size)
        self._next += 1
        self._size += size
        while self._size > self.capacity or len(self._prompts) > MOST_PROMPTS:
            self._drop(next(iter(self._prompts)))

    @property
    def tokens(self) -> int:
        """Tokens of all prompts that are remembered."""
        return sum(len(prompt.tokens) for prompt in self._prompts.values())

    def _of(self, key: Key) -> list[tuple[int, _Prompt]]:
        return [(place, prompt) for place, prompt in self._prompts.items() if prompt.key == key]

    def _drop(self, place: int) -> None:
        self._size -= self._prompts.pop(place).size


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
