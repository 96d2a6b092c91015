"""Snapshots on their way to storage: written by one thread, while the engine goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from engines.interface import PendingSnapshot
from engines.messages import Failure, SnapshotTaken, TakeSnapshot
from engines.performing import cause_of, failure_of_engine
from engines.storage import FolderStorage, checksums


class SnapshotWriter:
    """Writes one snapshot after the other. What has become of them is asked for, in the engine's own thread."""

    def __init__(self, storage: FolderStorage) -> None:
        self._storage = storage
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._under_way: list[Future[SnapshotTaken]] = []

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._under_way)

    def begin(self, call: TakeSnapshot, snapshot: PendingSnapshot) -> None:
        """Write it soon."""
        self._under_way.append(self._thread.submit(self._write, call, snapshot))

    def finished(self) -> list[SnapshotTaken]:
        """The answers that have become known since the last time."""
        done = [writing for writing in self._under_way if writing.done()]
        self._under_way = [writing for writing in self._under_way if writing not in done]
        return [writing.result() for writing in done]

    def close(self) -> None:
        """Finish what is being written; what waits is not begun."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, call: TakeSnapshot, snapshot: PendingSnapshot) -> SnapshotTaken:
        begun = time.monotonic()
        try:
            with self._storage.write(call.folder) as folder:
                snapshot.write(folder)
                size, sums = self._storage.size(folder), checksums(folder)
        except Exception as error:  # boundary: a plugin may raise anything; the run goes on, its inputs stay
            return SnapshotTaken(call.call_id, _failure(error, call))
        return SnapshotTaken(call.call_id, None, size, sums, time.monotonic() - begun)


def _failure(error: Exception, call: TakeSnapshot) -> Failure:
    """Why a snapshot was not written. Storage that cannot be written to is named."""
    what = f"the snapshot of run {call.run_id} after operation {call.seq_id}"
    failure = failure_of_engine(error, "writing a snapshot", f"writing {what} to {call.folder}")
    if not isinstance(error, OSError):
        return failure
    message = f"{what} was not written: the server's storage cannot be written to ({cause_of(error)})"
    return Failure("server", message, failure.error_id)
