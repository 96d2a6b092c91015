"""The life of a rank other than 0: join, learn what to load, then repeat what rank 0 is called with."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from engines.ranks.meeting import by_file
from engines.ranks.world import World

log = logging.getLogger("engines.ranks")

EXIT_LEADER_GONE = 3

Perform = Callable[[bytes], None]
Join = Callable[[World, bytes], Perform]
"""Given the world and rank 0's first words, load; gives what to do with each call."""


def follow(join: Join) -> int:
    """The command line of a follower: `--store FILE --rank R --size N --timeout S --start-timeout S --device NAME`,
    which `engines.ranks.leading` writes. Gives the exit status.

    Whatever it raises ends the process, which rank 0 notices; so does the end of its standard input.
    """
    parser = argparse.ArgumentParser(description="A rank of an engine; started by rank 0.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--size", required=True, type=int)
    parser.add_argument("--timeout", required=True, type=float)
    parser.add_argument("--start-timeout", required=True, type=float)
    parser.add_argument("--device", required=True)
    said = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s rank {said.rank}: %(message)s",
        stream=sys.stderr,
    )
    end_with_leader()
    device = torch.device(said.device)
    post = by_file(Path(said.store), said.size)
    return perform_all(World(post, said.rank, said.size, said.timeout, device, said.start_timeout), join)


def perform_all(world: World, join: Join) -> int:
    """From rank 0's first words to its last; gives the exit status."""
    perform = join(world, world.tell())
    while call := world.tell():
        perform(call)
    world.close()
    return 0


def end_with_leader() -> None:
    """End the process when its standard input does, in the middle of a collective too."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(EXIT_LEADER_GONE)

    threading.Thread(target=watch, name="leader", daemon=True).start()
