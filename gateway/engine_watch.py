"""Judging an engine process by its vital signs: whether it is stopped, stuck, or in a call that comes to no end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engines.vitals import Doing, Signs, Vitals

_PIECES = 5
"""Looks at the page within a bound. Time is counted in looks, so that a gateway which was stopped itself, or whose
machine slept, has missed one look and does not take that for the engine's silence."""
_LOADING = 4
"""Times as long a silence is borne while a process starts: libraries are read under the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds an engine process may give no sign of life, and its call make no progress."""

    silence_s: float
    hang_s: float


async def until_condemned(vitals: Vitals, patience: Patience) -> str:
    """Look at an engine process until it is of no use any more; why it is not."""
    look_s = min(patience.silence_s, patience.hang_s) / _PIECES
    silent_s = still_s = 0.0
    last = vitals.read()
    while True:
        await asyncio.sleep(look_s)
        signs = vitals.read()
        silent_s = 0.0 if signs.beats != last.beats else silent_s + look_s
        still_s = still_s + look_s if _still(signs, last) else 0.0
        starting = signs.beats == 0 or signs.doing is Doing.LOADING
        borne_s = patience.silence_s * (_LOADING if starting else 1)
        if silent_s >= borne_s:
            return f"it has given no sign of life for {borne_s:g} s"
        if still_s >= patience.hang_s:
            return f"its {_WORDS[signs.doing]} has made no progress for {patience.hang_s:g} s"
        last = signs


def _still(signs: Signs, last: Signs) -> bool:
    """Whether one and the same call has got no further. Loading has a bound of its own."""
    return signs.doing in _WORDS and signs.progress == last.progress


_WORDS = {
    Doing.TRAINING: "call",
    Doing.REPLAYING: "restoration of a run",
    Doing.SAMPLING: "decoding step",
    Doing.SNAPSHOT: "snapshot",
}
