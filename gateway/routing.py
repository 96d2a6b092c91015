"""Which of several engines that could answer a sample gets it.

An engine that has answered prompts with the same beginning may have what it computed for them, and the sampler's
adapter, in memory. So a sample goes where the longest known beginning of its prompt went last, unless that engine has
clearly more to do than another one. This is a guess that costs time at most: every engine answers alike. It is kept in
memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from engines.operations import SampleRequest

_SHORTEST = 32
"""Tokens of the shortest beginning that is remembered; longer ones have twice as many, and so on."""
_REMEMBERED = 20_000
"""Beginnings, of 16 bytes each."""
_TIMES = 1.5
_MORE = 8
"""An engine has clearly more to do from so many times the open samples of another one, and so many more, on."""


def beginnings(request: SampleRequest) -> list[bytes]:
    """What stands for a prompt of a sampler, for its beginnings, longest first, for the sampler and for its adapter."""
    found: list[bytes] = []
    digest = hashlib.blake2b(digest_size=16)
    for name in (request.adapter.folder if request.adapter is not None else "", request.session):
        digest.update(len(name).to_bytes(4) + name.encode())
        if name:
            found.append(digest.digest())
    data, tokens = request.prompt.data, request.prompt.shape[0]
    width = len(data) // max(tokens, 1)
    begin, end = 0, _SHORTEST
    while end < tokens:
        digest.update(data[begin * width : end * width])
        found.append(digest.digest())
        begin, end = end, 2 * end
    digest.update(data[begin * width :])
    found.append(digest.digest())
    return found[::-1]


class Router:
    """Where the beginnings of prompts went last."""

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, loads: Mapping[str, int], keys: Sequence[bytes]) -> str:
        """One of the engines, of which each has so many open samples, for a prompt with such `beginnings`."""
        idlest = min(loads, key=lambda name: (loads[name], _rank(name, keys)))
        home = next((home for key in keys if (home := self._homes.get(key)) in loads), None)
        if home is None or loads[home] >= loads[idlest] * _TIMES + _MORE:
            home = idlest
        for key in keys:
            self._homes[key] = home
            self._homes.move_to_end(key)
        while len(self._homes) > _REMEMBERED:
            self._homes.popitem(last=False)
        return home


def _rank(name: str, keys: Sequence[bytes]) -> bytes:
    """Among engines that have as much to do: the same for everybody who asks, another one for other prompts (rendezvous
    hashing), so that gateways that know nothing of each other's choices make the same ones."""
    return hashlib.blake2b(name.encode(), key=keys[0], digest_size=8).digest()
