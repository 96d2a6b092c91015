"""Whether a replay has given the numbers that it gave before."""

from __future__ import annotations

import logging
import math
import secrets

from engines import messages
from gateway.store.records import Future

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Relative difference of a loss or a gradient's norm up to which a replay is the same, where no digest says more."""
_NOTHING = 1e-9
"""Numbers below this are nothing on either side."""


def difference(recorded: Future, replayed: messages.Outcome) -> str | None:
    """How a replayed operation differs from what was recorded of it; None: not at all, as far as can be said.

    A deterministic engine gives digests, which must be equal. Otherwise the loss of a pass, or the gradient's norm of a
    step, must agree within `TOLERANCE`. A loss is a sum over tokens, whose terms may cancel out, and each of which is
    rounded otherwise in a pass that others shared: it may also differ by `TOLERANCE` nats for each token of the pass.
    """
    measure = replayed.summary.get("loss", replayed.summary.get("grad_norm"))
    if recorded.result_digest is not None and replayed.digest:
        same = recorded.result_digest == replayed.digest
    elif recorded.measure is not None and measure is not None:
        allowed = TOLERANCE * replayed.summary.get(
            "tokens", 0.0
        )  # a step has none: its norm is no sum of signs
        same = math.isclose(recorded.measure, measure, rel_tol=TOLERANCE, abs_tol=max(allowed, _NOTHING))
    else:
        return None
    if same:
        return None
    what = {"forward_backward": "loss", "optim_step": "gradient norm"}.get(recorded.kind, "result")
    numbers = f": {what} {recorded.measure!r} then, {measure!r} now" if measure is not None else ""
    return f"{recorded.kind} {recorded.seq_id}{numbers}"


class ReplayCheck:
    """Watches one restoration. The first difference is told at once; those that follow from it are counted."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._differences = 0

    def look(self, recorded: Future, replayed: messages.Outcome) -> str | None:
        """The sentence to record of the run, with the id of the log's line, when this is the first difference."""
        found = difference(recorded, replayed)
        if found is None:
            return None
        self._differences += 1
        if self._differences > 1:
            return None
        error_id = secrets.token_hex(6)
        log.error("error %s: the replay of run %s gives other numbers: %s", error_id, self._run_id, found)
        return f"a replay gave other numbers at {found}; the log has more under {error_id}"

    def close(self) -> None:
        """The replay is complete."""
        if self._differences:
            log.error("run %s: %d operations gave other numbers", self._run_id, self._differences)
