"""Exports that are encrypted before they are settled, beside the lane: no other run waits for it."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from engines.interface import UserError
from engines.operations import SaveWeightsResult, encode
from gateway.dispatch.outcomes import failed
from gateway.sealing import seal_folder
from gateway.settings import Settings
from gateway.store.records import Outcome

log = logging.getLogger(__name__)

_THREADS = 2
"""Apart from those that requests are worked on in, which would wait while some large adapters are encrypted."""


class Sealing:
    """What one lane has to encrypt. A process that dies over it repeats the save and this."""

    def __init__(self, settings: Settings) -> None:
        self._storage = settings.storage
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "sealing")
        self._under_way: dict[str, asyncio.Future[int]] = {}

    def takes(self, outcome: Outcome) -> bool:
        """Whether an outcome is of a save whose files are to be encrypted."""
        return not outcome.failed and "recipients" in outcome.future.context.get("checkpoint", {})

    def start(self, outcome: Outcome, settle: Callable[[Outcome], None]) -> None:
        """Encrypt in a worker thread, then hand the outcome to `settle`."""
        task = asyncio.create_task(self._finish(outcome, settle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait until everything is encrypted and handed over."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self) -> None:
        """Forget everything: it is done again from the database. What a thread has begun it ends all the same."""
        for task in self._tasks:
            task.cancel()

    async def _finish(self, outcome: Outcome, settle: Callable[[Outcome], None]) -> None:
        settle(await self._sealed(outcome))

    async def _sealed(self, outcome: Outcome) -> Outcome:
        future, checkpoint = outcome.future, outcome.checkpoint
        assert checkpoint is not None
        recipients = future.context["checkpoint"]["recipients"]
        try:
            size = await self._seal(checkpoint.folder, recipients)
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
        except Exception:  # boundary: the sender gets it as a failed future, the log has it under the same id
            error_id = secrets.token_hex(6)
            log.exception("%s: its files could not be encrypted (%s)", future.request_id, error_id)
            message = f"the weights were not saved: encrypting them failed; the server's log says why under {error_id}"
            return failed(future, "server", message, error_id)
        result = encode(SaveWeightsResult(size_bytes=size))
        return replace(outcome, result=result, checkpoint=replace(checkpoint, size_bytes=size))

    async def _seal(self, folder: str, recipients: list[str]) -> int:
        """Encrypt in a thread, after one that has been forgotten over the same folder has ended."""
        while (earlier := self._under_way.get(folder)) is not None:
            await asyncio.wait({earlier})
        work = partial(seal_folder, self._storage, folder, recipients)
        thread = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._under_way[folder] = thread
        thread.add_done_callback(lambda _: self._under_way.pop(folder))
        # A thread cannot be cancelled: when this is, it stays known until it has ended.
        await asyncio.wait({thread})
        return thread.result()
