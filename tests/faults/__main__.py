"""`python -m tests.faults`: processes are killed and hung, databases restarted and cut off, while eight clients of the
official SDK train and sample; then every number is compared with that of a run to which nothing happened. Minutes."""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos.haste import hurried
from tests.faults.episode import Episode, play
from tests.faults.scene import Kind
from tests.faults.schedule import table

HASTE = 5.0
"""How many times shorter the SDK waits before it tries again; else it is its waits that one would measure."""


@dataclass(frozen=True, slots=True)
class Part:
    """A scene, its share of the faults of its database, and of the time."""

    kind: Kind
    faults: float
    time: float


_NUMPY = Kind("sqlite", "numpy engine", "fake/model", {"delay_s": 0.002})
_TINY = Kind("sqlite", "tandem/tiny", "tandem/tiny", {"threads": 1}, "hf", tolerance=1e-5, steps=20)
_EXACT = replace(
    _TINY,
    engine="tandem/tiny, deterministic",
    options={"threads": 1, "deterministic": True},
    tolerance=0.0,
)
PARTS = {
    "sqlite": [Part(_NUMPY, 0.85, 0.65), Part(_EXACT, 0.15, 0.35)],
    "postgres": [
        Part(replace(_NUMPY, database="postgres"), 0.5, 0.35),
        Part(replace(_NUMPY, database="postgres", gateways=2), 0.35, 0.35),
        Part(replace(_TINY, database="postgres"), 0.15, 0.3),
    ],
}
"""What is tried on each database. An engine of torch takes long to start, so it gets fewer faults than its time."""
_SHARE_FOR_FAULTS = 0.8
"""Of the time; the rest is for comparing."""


def main() -> int:
    """The command line; its exit status is 0 when all faults happened and nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--faults", type=int, default=200, help="how many, in all")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the faults and their times; a new one if none"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time for it, roughly")
    parser.add_argument("--keep", type=Path, default=None, help="folder for logs and databases, kept")
    arguments = parser.parse_args()
    logging.getLogger("tinker").setLevel(logging.CRITICAL)  # of errors that pass, it tells at length
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="tandem-faults-"))
    databases = ["sqlite", "postgres"] if arguments.database == "both" else [arguments.database]
    print(f"seed {seed}; logs and databases in {folder}", flush=True)
    episodes = []
    started = time.monotonic()
    with hurried(HASTE):
        for number, part in enumerate(part for name in databases for part in PARTS[name]):
            seconds = arguments.minutes * 60 * part.time / len(databases) * _SHARE_FOR_FAULTS
            count = round(arguments.faults * part.faults / len(databases))
            place = folder / f"{number}-{part.kind.database}-{part.kind.plugin}-{part.kind.gateways}"
            place.mkdir(parents=True)
            episodes.append(play(part.kind, count, seed + number, seconds, place, _say))
            for problem in episodes[-1].problems:
                _say(problem)
    _report(episodes, time.monotonic() - started)
    problems = [problem for episode in episodes for problem in episode.problems]
    if not problems and arguments.keep is None:
        shutil.rmtree(folder)
    if problems:
        print(f"seed {seed}; look into {folder}")
    too_few = sum(episode.too_few for episode in episodes)
    if too_few:
        print(f"there was no time for {too_few} more faults; give more --minutes")
    return int(bool(problems or too_few))


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _report(episodes: list[Episode], seconds: float) -> None:
    for episode in episodes:
        print(f"\n{episode.kind.name}: {episode.courses} runs, {episode.seconds:.0f} s")
        print("\n".join(table(episode.pauses, episode.happened)))
        print(", ".join(f"{count} {call}" for call, count in sorted(episode.calls.items())))
        print(f"differences: {len(episode.problems)}")
    faults = sum(len(episode.happened) for episode in episodes)
    calls = sum(sum(episode.calls.values()) for episode in episodes)
    problems = sum(len(episode.problems) for episode in episodes)
    print(
        f"\n{faults} faults, {calls} calls answered once, {problems} differences, {seconds:.0f} s", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
