"""A follower that does what it is told in a word, and a leader of two such: `python -m tests.ranks.echo [--lead]`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from engines.ranks.following import Perform, follow
from engines.ranks.leading import Leader
from engines.ranks.world import World

CPU = torch.device("cpu")


def answer(world: World, word: bytes) -> list[bytes]:
    """Every rank's part of a call; what rank 0 has heard."""
    if not world.leads and word == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if not world.leads and word == b"stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if not world.leads and word == b"raise":
        raise RuntimeError("as it was told")
    said = word * world.rank
    heard = world.exchange(said)
    assert [len(each) for each in heard] == [len(word) * rank for rank in range(world.size)]
    return world.collect(said)


def join(world: World, first: bytes) -> Perform:
    assert first == b"begin"

    def perform(word: bytes) -> None:
        if word == b"stall":  # heard, and never done
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            answer(world, word)

    return perform


def lead(timeout_s: float = 30.0, size: int = 3) -> Leader:
    """A leader whose followers have begun."""
    leader = Leader("tests.ranks.echo", size, timeout_s, [CPU] * size)
    leader.call(b"begin", lambda: None)
    return leader


if __name__ == "__main__":
    if sys.argv[1:] == ["--lead"]:
        leading = lead()
        sys.stdout.write(" ".join(map(str, leading.children)) + "\n")
        sys.stdout.flush()
        time.sleep(600)
    sys.exit(follow(join))
