"""Calls everything that the SDK of this environment offers, and writes down what came of it.

    python -m tests.compat.probe URL KEY BASE_MODEL OUTPUT

One JSON object a line in OUTPUT: first `{"surface": [...]}`, then for each call
`{"name": ..., "problem": null | ..., "broken": null | ..., "seconds": ...}`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinker

from tests.compat.registry import BrokenInSdk, Check, check_of
from tests.compat.surface import surface
from tests.compat.world import Call, World, quiet

CALLS_OF = ("training", "sampling", "service", "futures", "rest", "admin", "cli")
LONGEST_S = 90.0
"""A call that takes longer has failed: old SDKs repeat for minutes what will never succeed."""

_TARGETS: dict[str, Callable[[World], Any]] = {
    "ServiceClient": lambda world: world.service,
    "RestClient": lambda world: world.rest,
    "AdminClient": lambda world: tinker.AdminClient(base_url=world.url, api_key=world.key),
    "TrainingClient": lambda world: world.new_run(),
    "SamplingClient": lambda world: world.sampler,
    "BackcompatTrainingClientFuture": lambda world: world.service.create_lora_training_client(
        world.base_model, rank=4, seed=7
    ),
    "BackcompatSamplingClientFuture": lambda world: world.service.create_sampling_client(
        base_model=world.base_model
    ),
    "tinker.auth": lambda world: tinker.auth,
}


def main(url: str, key: str, base_model: str, output: str) -> None:
    """Call everything."""
    quiet()
    logging.disable(logging.ERROR)
    load_calls()
    names = surface()
    with Path(output).open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as scratch:
        world = World(url, key, base_model, Path(scratch))
        print(json.dumps({"surface": names}), file=file, flush=True)
        for name in names:
            started = time.monotonic()
            outcome = outcome_of(world, name)
            seconds = time.monotonic() - started
            line = {"name": name, "problem": outcome.problem, "broken": outcome.broken, "seconds": seconds}
            print(json.dumps(line), file=file, flush=True)
    os._exit(0)  # the SDK's threads are not waited for


def load_calls() -> None:
    """Register every call."""
    for topic in CALLS_OF:
        importlib.import_module(f"tests.compat.calls_{topic}")


@dataclass(frozen=True)
class Outcome:
    """What came of a call: its problem, or None where all is well; and what is broken in the SDK itself."""

    problem: str | None = None
    broken: str | None = None


def outcome_of(world: World, name: str) -> Outcome:
    """Call it. Raises LookupError for a name without a call: nothing is skipped."""
    function = check_of(name)
    if function is None:
        raise LookupError(f"there is no call for {name}: write one in tests/compat")
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(_attempt(world, name, function)), daemon=True)
    thread.start()
    thread.join(LONGEST_S)
    return found[0] if found else Outcome(f"no answer within {LONGEST_S:.0f} s")


def _attempt(world: World, name: str, function: Check) -> Outcome:
    try:
        function(_call(world, name))
    except BrokenInSdk as error:
        return Outcome(broken=str(error))
    except Exception as error:  # boundary: whatever goes wrong is what the table says of this call
        frames = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(frames) if "compat" in frame.filename), frames[-1])
        return Outcome(
            f"{type(error).__name__}: {str(error)[:600]} [{Path(ours.filename).name}:{ours.lineno}]"
        )
    return Outcome()


def _call(world: World, name: str) -> Call:
    owner, _, method = name.rpartition(".")
    operator, _, operand = name.partition(" ")
    if owner in _TARGETS:
        return Call(world, method, _TARGETS[owner](world))
    if operator == "pickle":
        return Call(world, operator, _TARGETS[operand](world))
    if operand and operator != "tinker":
        return Call(world, operator)
    return Call(world, method if owner else name)


if __name__ == "__main__":
    main(*sys.argv[1:])
