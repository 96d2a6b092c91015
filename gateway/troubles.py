"""Trouble in the log: told when it begins, at growing intervals while it lasts, and once when it is over."""

from __future__ import annotations

import logging
import time

_FIRST_PAUSE_S = 10.0
_LONGEST_PAUSE_S = 600.0
_QUIET_S = 3.0
"""Seconds without a failure before a success counts as the end: on a full disk, what is small succeeds in between."""
_FORGOTTEN_S = 60.0
"""Seconds after which a failure is a new trouble, also when nothing has succeeded meanwhile."""


class Trouble:
    """One thing that may go wrong for a while; `over` is the sentence that tells its end."""

    def __init__(self, log: logging.Logger, over: str, level: int = logging.WARNING) -> None:
        self._log = log
        self._over = over
        self._level = level
        self._began: float | None = None
        self._failed = 0.0
        self._failures = 0
        self._told = 0.0
        self._pause = _FIRST_PAUSE_S
        self.problem: str | None = None
        """What is wrong at present; None: nothing is known to be."""

    def failed(self, problem: str) -> None:
        """It went wrong, perhaps not for the first time."""
        now = time.monotonic()
        new = self._began is None or now - self._failed > max(_FORGOTTEN_S, 2 * self._pause)
        self.problem, self._failed = problem, now
        if new:
            self._began, self._told, self._failures, self._pause = now, now, 1, _FIRST_PAUSE_S
            self._log.log(self._level, "%s", problem)
            return
        self._failures += 1
        if now - self._told >= self._pause:
            lasts = now - (self._began or now)
            self._log.log(self._level, "%s (for %.0f s, %d times)", problem, lasts, self._failures)
            self._told = now
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

    def succeeded(self, *, surely: bool = False) -> None:
        """It went well. That ends the trouble when the last failure was some seconds ago, or if it is `surely` over."""
        if self._began is None:
            return
        now = time.monotonic()
        if surely or now - self._failed >= _QUIET_S:
            lasted = self._failed - self._began
            self._log.log(self._level, "%s, after %.0f s and %d failures", self._over, lasted, self._failures)
            self._began = self.problem = None
