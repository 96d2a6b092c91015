"""`python -m tests.chaos`: the official SDK with its own waits, of seconds, over a mistreated connection; minutes."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.chaos.comparison import compare
from tests.served import ServedGateway

_PATIENCE_S = 600.0
"""The SDK waits up to 30 s after each loss of a poll in a row, and up to ten losses in a row happen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gateway = ServedGateway(Path(folder))
        gateway.start()
        started = time.monotonic()
        try:
            happened = compare(gateway, arguments.steps, arguments.seed, _PATIENCE_S)
        finally:
            gateway.close()
    print(
        f"the same weights after {arguments.steps} steps and {time.monotonic() - started:.0f} s: {dict(happened)}"
    )


if __name__ == "__main__":
    main()
