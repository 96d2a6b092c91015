"""What all engines share about sampling: where randomness comes from, and when a sequence is complete."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.operations import SampleRequest, TopLogprobs
from engines.tensors import Tensor

Best = tuple[tuple[int, float], ...]
"""Best alternatives of one position as (token, logprob), best first."""

Decode = Callable[[list[int]], str]
"""The text of some tokens, special ones included."""

_LONGEST_CHARACTER = 16
"""Tokens in a row that may end inside a character or have no text. A character has four bytes at most, but a token may
complete one and begin the next; a run this long is no text."""


def uniforms(seed: int, sample_index: int, position: int) -> float:
    """The random number in [0, 1) that decides the token at `position` of sequence `sample_index` of a request.

    It depends on nothing else, neither on what is sampled beside it nor on what was sampled before: the first 64 bits,
    little-endian, of the BLAKE2b-64 hash of `"<seed>/<sample_index>/<position>"`, their upper 53 as a binary fraction.
    """
    digest = hashlib.blake2b(b"%d/%d/%d" % (seed, sample_index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def batch_uniforms(draws: Iterable[tuple[int, int, int]]) -> NDArray[np.float64]:
    """`uniforms` of each (seed, sample index, position): float64 [N]."""
    return np.array([uniforms(*draw) for draw in draws], dtype=np.float64)


def row_uniforms(seed: int, row: int, count: int) -> NDArray[np.float64]:
    """The random numbers in [0, 1) that decide the alternatives to a prompt's token at `row` + 1: float64 [count].

    Word j, 64 bits little-endian, of SHAKE-128 of `"<seed>/prompt/<row>"`, its upper 53 bits as a binary fraction: the
    first ones do not depend on how many there are.
    """
    digest = hashlib.shake_128(b"%d/prompt/%d" % (seed, row)).digest(8 * count)
    return (np.frombuffer(digest, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


class StopTracker:
    """Tells after each token of one sequence whether it is complete.

    A sequence ends with a stop token, with an end-of-sequence token when the request stops at those, or when its text
    contains a stop string, which may begin and end inside tokens. Only the newest tokens are decoded: those of the
    last piece of text, for context, and those that came since.
    """

    def __init__(self, request: SampleRequest, eos_tokens: Sequence[int], decode: Decode) -> None:
        self._tokens = frozenset(request.stop_tokens)
        if request.stop_at_eos:
            self._tokens |= frozenset(eos_tokens)
        self._strings = request.stop_strings
        self._overlap = max((len(string) for string in self._strings), default=1) - 1
        self._decode = decode
        self._context: list[int] = []
        self._new: list[int] = []
        self._tail = ""

    def add(self, token: int) -> bool:
        """Whether this token is the sequence's last one."""
        if token in self._tokens:
            return True
        return bool(self._strings) and self._text_ends(token)

    def _text_ends(self, token: int) -> bool:
        self._new.append(token)
        before = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._new)[len(before) :]
        complete = not text.endswith("\ufffd") or len(self._new) >= _LONGEST_CHARACTER
        # The replacement character at the end stands for a character whose bytes have not all come.
        seen = self._tail + (text if complete else text.rstrip("\ufffd"))
        if any(string in seen for string in self._strings):
            return True
        if complete and (text or len(self._new) >= _LONGEST_CHARACTER):
            self._context, self._new = self._new, []
            self._tail = seen[max(0, len(seen) - self._overlap) :]
        return False


def top_logprobs(best: Sequence[Best], count: int) -> TopLogprobs:
    """[N, count] tensors; a position without alternatives holds token 0 with logprob NaN."""
    nothing = ((0, float("nan")),) * count
    rows = np.array([pairs or nothing for pairs in best], dtype=np.float64).reshape(-1, count, 2)
    return TopLogprobs(Tensor.of(rows[:, :, 0].astype(np.int32)), Tensor.of(rows[:, :, 1].astype(np.float32)))
