"""Vital signs of an engine process: one page of memory that it shares with the gateway.

A page, and no messages, because it can be written in the middle of a call, and read when its writer is stopped, stuck
or dead: what a process was doing when it died says what is to be blamed. The gateway judges (`gateway.engine_watch`).
"""

from __future__ import annotations

import enum
import mmap
import os
import platform
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

BEAT_S = 0.1
"""Seconds between two beats of the heart; it takes the interpreter's lock each time."""

_FIELD = struct.Struct("<Q")
_BEATS, _PASSES, _WORK, _DOING, _SEQ = range(0, 5 * _FIELD.size, _FIELD.size)
COPY_BYTES = 5 * _FIELD.size
"""Bytes of what `Vitals.copy` gives."""


class Doing(enum.IntEnum):
    """What the loop of an engine process is in the middle of."""

    NOTHING = 0
    LOADING = 1  # the base model
    TRAINING = 2  # a call that has not been answered before
    REPLAYING = 3  # an operation that has been answered before, or a snapshot, to restore a run
    SAMPLING = 4  # a decoding step, or taking a sample in
    SNAPSHOT = 5  # copying a run's state


class Signs(NamedTuple):
    """The page at one moment. `beats` grows while the interpreter runs; `progress` whenever a piece of work begins and
    with each of the plugin's passes; `seq_id` is that of the first operation of the call at hand."""

    beats: int
    progress: tuple[int, int]
    doing: Doing
    seq_id: int


class Vitals:
    """The page behind a file descriptor, which a child process may inherit."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._work = 0

    @classmethod
    def create(cls) -> Vitals:
        """A new page, all zeros."""
        descriptor = _memory()
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return cls(descriptor)

    def read(self) -> Signs:
        """What the page says now."""
        beats, passes, work, doing, seq_id = (
            self._get(field) for field in (_BEATS, _PASSES, _WORK, _DOING, _SEQ)
        )
        return Signs(beats, (work, passes), Doing(doing), seq_id)

    @contextmanager
    def during(self, doing: Doing, seq_id: int = 0) -> Iterator[None]:
        """Say what is being done. Not said any more afterwards, unless the process does not get that far."""
        self._work += 1
        self._put(_WORK, self._work)
        self._put(_SEQ, seq_id)
        self._put(_DOING, doing)
        yield
        self._put(_DOING, Doing.NOTHING)

    @contextmanager
    def meanwhile(self, doing: Doing) -> Iterator[None]:
        """Say what goes on while the loop waits. It is no new piece of work: only passes are progress in it."""
        self._put(_SEQ, 0)
        self._put(_DOING, doing)
        yield
        self._put(_DOING, Doing.NOTHING)

    def beat(self, passes: int) -> None:
        """One beat, and how many passes the plugin has made."""
        self._put(_PASSES, passes)
        self._put(_BEATS, self._get(_BEATS) + 1)

    def copy(self) -> bytes:
        """What the page says now, for a page elsewhere."""
        return self._page[:COPY_BYTES]

    def paste(self, copied: bytes) -> None:
        """Let the page say what another one has said. Raises ValueError when it is no copy of a page."""
        if len(copied) != COPY_BYTES:
            raise ValueError(f"a copied page has {COPY_BYTES} bytes, not {len(copied)}")
        self._page[:COPY_BYTES] = copied

    def close(self) -> None:
        """Let go of the page; more than once is no error."""
        if not self._page.closed:
            self._page.close()
            os.close(self.descriptor)

    def _get(self, field: int) -> int:
        value: int = _FIELD.unpack_from(self._page, field)[0]
        return value

    def _put(self, field: int, value: int) -> None:
        _FIELD.pack_into(self._page, field, value)


class Heart(threading.Thread):
    """Beats as long as the interpreter runs, whatever the loop is doing. `passes` counts the plugin's."""

    def __init__(self, vitals: Vitals) -> None:
        super().__init__(name="heart", daemon=True)
        self.vitals = vitals
        self.passes: Callable[[], int] = lambda: 0

    def run(self) -> None:
        while True:
            self.vitals.beat(self.passes())
            time.sleep(BEAT_S)


def _memory() -> int:
    """A descriptor of memory without a name."""
    if platform.system() == "Linux":
        return os.memfd_create("tandem-vitals")
    with tempfile.TemporaryFile(prefix="tandem-") as file:
        return os.dup(file.fileno())
