"""Rank 0's side: starts the other ranks as its children, has them follow, and notices when one is gone."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from engines.interface import EngineBroken, Meeting
from engines.ranks.meeting import Terms, by_file, lead
from engines.ranks.world import START_TIMEOUT_S, World

log = logging.getLogger("engines.ranks")

T = TypeVar("T")

_FAREWELL_S = 5.0


class Leader:
    """The group of an engine that has `size` ranks, seen from rank 0.

    `module` is run with `python -m` as each of the others; it calls `engines.ranks.following.follow`. With a `meeting`
    nobody is started: others have done that, and notice when one of them ends.
    """

    def __init__(
        self,
        module: str,
        size: int,
        timeout_s: float,
        devices: list[torch.device],
        start_timeout_s: float = START_TIMEOUT_S,
        meeting: Meeting | None = None,
    ) -> None:
        """Raises EngineBroken when the ranks have not all begun within `start_timeout_s`: another try may go well."""
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-ranks-")  # nobody else may read it
        path = str(Path(self._folder.name) / "store")
        self._lost: str | None = None
        self._closing = False
        self._children = [
            _start(module, path, rank, size, (timeout_s, start_timeout_s), devices[rank])
            for rank in range(1, size if meeting is None else 1)
        ]
        for rank, child in enumerate(self._children, 1):
            threading.Thread(target=self._watch, args=(rank, child), name=f"rank {rank}", daemon=True).start()
        try:
            if meeting is None:
                post = by_file(Path(path), size)
            else:
                post = lead(meeting, Terms(timeout_s, start_timeout_s, devices[0].type))
            self.world = World(post, 0, size, timeout_s, devices[0], start_timeout_s)
        except (RuntimeError, ValueError) as error:
            self._closing = True
            self._kill()
            self._folder.cleanup()
            raise EngineBroken(
                f"the {size} ranks did not find each other within {start_timeout_s:g} s: {error}; their log says why"
            ) from error

    @property
    def children(self) -> list[int]:
        """Process ids of ranks 1, 2 …"""
        return [child.pid for child in self._children]

    def check(self) -> None:
        """Raises EngineBroken when a rank is gone."""
        if self._lost is not None:
            raise EngineBroken(self._lost)

    def call(
        self,
        message: bytes,
        perform: Callable[[], T],
        agreed: tuple[type[Exception], ...] | type[Exception] = (),
    ) -> T:
        """Have all ranks perform a call; `perform` is this rank's part. Errors of the types `agreed` are such that all
        ranks raise together.

        Whatever else goes wrong leaves ranks that no longer do the same: it is the end of all of them, EngineBroken.
        """
        self.check()
        try:
            self.world.tell(message)
            return perform()
        except agreed:
            raise
        except Exception as error:  # boundary: the host ends the process, which is replaced
            self._lost = self._lost or f"the ranks fell apart: {error}"
            self._kill()
            raise EngineBroken(self._lost) from error

    def close(self) -> None:
        """End the followers; those that do not listen are killed."""
        self._closing = True
        if self._lost is None:
            try:
                self.world.tell(b"")
            except RuntimeError as error:
                log.warning("the ranks are gone already: %s", error)
            for child in self._children:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_FAREWELL_S)
        self.abandon()

    def abandon(self) -> None:
        """End everything at once, whatever the followers are doing."""
        self._closing = True
        self._kill()
        self._folder.cleanup()
        self.world.close()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        status = child.wait()
        if not self._closing and self._lost is None:
            self._lost = f"rank {rank} has ended with status {status}"
            log.error("%s; the others cannot go on without it", self._lost)
            self._kill()

    def _kill(self) -> None:
        """End all followers: what this rank waits for then fails at once."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
            if child.stdin is not None:
                child.stdin.close()


def _start(
    module: str, store: str, rank: int, size: int, bounds_s: tuple[float, float], device: torch.device
) -> subprocess.Popen[bytes]:
    """A follower; `bounds_s` are those of a call and of the start. It ends when the pipe to its standard input does,
    thus when this process ends, however it ends."""
    command = [sys.executable, "-m", module, "--store", store, "--rank", str(rank), "--size", str(size)]
    command += ["--timeout", str(bounds_s[0]), "--start-timeout", str(bounds_s[1]), "--device", str(device)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
