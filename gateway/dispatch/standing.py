"""Where an accepted call stands, in words for its client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a call waits for room or for its engine, and the sentence that says for what."""

    paused: bool
    reason: str
