"""How much of one call to an engine an operation makes up."""

from __future__ import annotations

from gateway.dispatch.inputs import RecentInputs
from gateway.store.records import Future

_QUICK = ("create_run", "optim_step")
_QUICK_IN_A_CALL = 64
_PASSES = ("forward", "forward_backward")
_BYTES_OF_A_TOKEN = 16
"""In the input of a pass, with a target and a weight."""


def weight(inputs: RecentInputs, future: Future, *, packs: bool, pass_tokens: int) -> float:
    """The share of one call to an engine. What is quick goes in numbers; passes go together if the engine `packs` them,
    as many as fill about one pass of so many tokens; everything else goes alone."""
    if future.kind in _QUICK:
        return 1 / _QUICK_IN_A_CALL
    size = inputs.size(future.request_id)
    if not packs or size is None or future.kind not in _PASSES:
        return 1.0
    return size / (_BYTES_OF_A_TOKEN * pass_tokens)
