"""The environment of engine processes: read and changed in this file only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DETERMINISTIC_PRODUCTS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without it products on CUDA may differ from one process to the next, and torch's deterministic mode refuses them."""
_ROOT = str(Path(__file__).parents[1])


def variable(name: str) -> str:
    """What a variable holds; empty: nothing, or it is not set."""
    return os.environ.get(name, "")


def set_defaults(values: Mapping[str, str]) -> None:
    """Set the variables that are not set, for libraries that are loaded later."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def for_engine(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """What an engine process gets: this process's environment unless another is given, and where it finds `engines`,
    installed in its interpreter or not."""
    kept = dict(os.environ if inherited is None else inherited)
    # Threads that spin long while they wait take the cores away from the gateway and from each other: measured 2 to 5
    # times slower on two cores of which one is busy. Those that sleep at once are 1.5 times slower on idle cores, on a
    # model as small as the built-in one. A short spin (libgomp's own setting) loses little either way.
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", "500")
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, kept.get("PYTHONPATH"))))
    return kept
