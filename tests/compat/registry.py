"""Which call belongs to which name of an SDK's surface."""

from __future__ import annotations

from collections.abc import Callable

from tests.compat.world import Call

Check = Callable[[Call], None]


class BrokenInSdk(Exception):
    """An SDK's method fails by itself, whatever a server answers, and works with the SDK's fault repaired."""


CHECKS: dict[str, Check] = {}

_SAME = {
    "BackcompatTrainingClientFuture": "TrainingClient",
    "BackcompatSamplingClientFuture": "SamplingClient",
}
"""Classes that pass calls on to another."""


def check(*names: str) -> Callable[[Check], Check]:
    """Register a call for names of the surface; it serves their `_async` forms too."""

    def register(function: Check) -> Check:
        for name in names:
            assert name not in CHECKS, name
            CHECKS[name] = function
        return function

    return register


def check_of(name: str) -> Check | None:
    """The call for a name, or None when there is none."""
    alternatives = [name, name.removesuffix("_async")]
    for wrapper, client in _SAME.items():
        alternatives += [other.replace(wrapper, client) for other in alternatives if wrapper in other]
    return next((CHECKS[candidate] for candidate in alternatives if candidate in CHECKS), None)
