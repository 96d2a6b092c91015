"""A client of this environment's SDK that does what it is told, a JSON line at a time.

    python -m tests.compat.drive URL KEY BASE_MODEL

Reads `[action, arguments…]` from stdin and answers with the result on stdout.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker import types

from tests.compat.world import TOKENS, World, logprobs, prompt, quiet, resolved, train


class Client:
    """Holds the runs of one SDK; they are called by number."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._runs: list[Any] = []

    def begin(self, seed: int) -> int:
        self._runs.append(self._world.new_run(seed=seed))
        return len(self._runs) - 1

    def resume(self, path: str) -> int:
        self._runs.append(resolved(self._world.service.create_training_client_from_state(path)))
        return len(self._runs) - 1

    def train(self, run: int, steps: int) -> None:
        for _ in range(steps):
            train(self._runs[run])

    def logprobs(self, run: int) -> list[float]:
        return logprobs(self._runs[run], TOKENS)

    def save(self, run: int) -> str:
        return str(resolved(self._runs[run].save_state(self._world.name())).path)

    def save_sampler(self, run: int) -> str:
        return str(resolved(self._runs[run].save_weights_for_sampler(self._world.name())).path)

    def sample(self, path: str) -> list[list[Any]]:
        """Tokens and logprobs, the same for the same weights."""
        sampler = resolved(self._world.service.create_sampling_client(model_path=path))
        params = types.SamplingParams(max_tokens=6, seed=5, temperature=1.0)
        (sequence,) = resolved(sampler.sample(prompt(), 1, params)).sequences
        return [list(sequence.tokens), [float(value) for value in sequence.logprobs]]

    def runs(self) -> list[str]:
        listed = resolved(self._world.rest.list_training_runs(limit=100))
        return [run.training_run_id for run in listed.training_runs]


def main(url: str, key: str, base_model: str) -> None:
    """Serve stdin until it ends."""
    quiet()
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        client = Client(World(url, key, base_model, Path(scratch)))
        for line in sys.stdin:
            action, *arguments = json.loads(line)
            function: Callable[..., Any] = getattr(client, action)
            sys.stdout.write(json.dumps(function(*arguments)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
