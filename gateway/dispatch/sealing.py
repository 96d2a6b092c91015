"""Exports that are encrypted before they are settled, beside the lane: no other run waits for it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace

from engines.interface import UserError
from engines.operations import SaveWeightsResult, encode
from gateway.dispatch.outcomes import failed
from gateway.sealing import seal_folder
from gateway.settings import Settings
from gateway.store.records import Outcome

log = logging.getLogger(__name__)


class Sealing:
    """What one lane has to encrypt. A process that dies over it repeats the save and this."""

    def __init__(self, settings: Settings) -> None:
        self._storage_dir = settings.storage_dir
        self._tasks: set[asyncio.Task[None]] = set()

    def takes(self, outcome: Outcome) -> bool:
        """Whether an outcome is of a save whose files are to be encrypted."""
        return not outcome.failed and "recipients" in outcome.future.context.get("checkpoint", {})

    def start(self, outcome: Outcome, settle: Callable[[Outcome], None]) -> None:
        """Encrypt in a worker thread, then hand the outcome to `settle`."""
        task = asyncio.create_task(self._finish(outcome, settle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Forget everything: it is done again from the database."""
        for task in self._tasks:
            task.cancel()

    async def _finish(self, outcome: Outcome, settle: Callable[[Outcome], None]) -> None:
        settle(await self._sealed(outcome))

    async def _sealed(self, outcome: Outcome) -> Outcome:
        future, checkpoint = outcome.future, outcome.checkpoint
        assert checkpoint is not None
        recipients = future.context["checkpoint"]["recipients"]
        try:
            size = await asyncio.to_thread(seal_folder, self._storage_dir, checkpoint.folder, recipients)
        except UserError as error:
            return failed(future, "user", str(error))
        except OSError as error:
            log.error("%s: its files could not be encrypted: %s", future.request_id, error)
            cause = "the operating system refused" if error.errno is None else os.strerror(error.errno)
            return failed(
                future,
                "server",
                f"the weights were not saved: the server's storage cannot be written to ({cause})",
            )
        result = encode(SaveWeightsResult(size_bytes=size))
        return replace(outcome, result=result, checkpoint=replace(checkpoint, size_bytes=size))
