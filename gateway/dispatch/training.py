"""The lane of the runs' operations: claim → call → settle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engines.messages import RunAddress
from engines.operations import OperationKind
from gateway.dispatch.inputs import RecentInputs
from gateway.dispatch.outcomes import failed, outcomes_of
from gateway.dispatch.quarantine import Quarantine, suspected
from gateway.dispatch.recovery import RestoreFailed, restore_run
from gateway.dispatch.run_queue import RunQueue, TrainingQueue
from gateway.dispatch.sealing import Sealing
from gateway.engine_process import EngineProcess
from gateway.errors import EngineLost
from gateway.settings import Settings
from gateway.store import Store
from gateway.store.futures import Claim
from gateway.store.records import Future, Outcome, Settled

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """What is in memory and what is in the database have come apart; start over from the database."""


class TrainingLane:
    """The operations of all runs of one engine, each run's in order."""

    def __init__(
        self, store: Store, settings: Settings, on_settled: Callable[[Settled | None], None]
    ) -> None:
        self._store = store
        self._settings = settings
        self._on_settled = on_settled
        self._queue = TrainingQueue()
        self._unopened: dict[str, list[Future]] = {}
        self._inputs = RecentInputs(settings.input_cache_bytes)
        self._broken: Exception | None = None
        self._wake = asyncio.Event()
        self._to_drop: set[str] = set()
        self._sealing = Sealing(settings)
        self.resident: set[str] = set()

    def accept(self, future: Future, body: bytes | None = None) -> None:
        """Queue an operation that has become durable; `body` is its input where that is at hand."""
        run_id = future.run_id or ""
        if body is not None and future.open:
            self._inputs.add(future.request_id, body)
        queue = self._queue.runs.get(run_id)
        if queue is None and future.kind == "create_run":
            self._queue.open_run(run_id, future.owner, 0, [future])
        elif queue is None:
            self._unopened.setdefault(run_id, []).append(future)
        elif future.seq_id < queue.next_seq:
            self._fail_late(queue, future)
        else:
            self._queue.add(future)
        self._wake.set()

    def reset(self) -> None:
        """Forget everything."""
        self._queue = TrainingQueue()
        self._unopened.clear()
        self._inputs.clear()
        self._broken = None
        self._to_drop.clear()
        self._sealing.cancel()
        self.resident.clear()

    def reopen(self, run_id: str) -> None:
        """A run has open operations in the database."""
        self._unopened.setdefault(run_id, [])
        self._wake.set()

    def drop(self, run_id: str) -> None:
        """Free a run's memory between two calls; its log stays, and an operation that comes later restores it."""
        self._to_drop.add(run_id)
        self._wake.set()

    def waiting_in_run(self, run_id: str) -> int:
        """Operations of a run that wait or run."""
        queue = self._queue.runs.get(run_id)
        return len(queue.waiting) if queue is not None else len(self._unopened.get(run_id, ()))

    async def feed(self, engine: EngineProcess, quarantine: Quarantine) -> None:
        """Until the engine is lost, or what is in memory cannot be trusted any more."""
        while True:
            await self._work_or_time(engine)
            await self._open_runs()
            await self._drop_runs(engine)
            self._fail_gaps()
            batch = self._queue.take_batch()
            if batch:
                await quarantine.enter(alone=suspected(batch[0]))
                self._settle(await self._call(engine, await self._claim(engine, batch)))
                quarantine.leave()

    async def _work_or_time(self, engine: EngineProcess) -> None:
        """Wait until there may be something to do: an operation, a broken write, or a gap to look after."""
        if not (self._queue or self._unopened or self._to_drop or self._broken):
            with contextlib.suppress(TimeoutError):  # then it is time to look at the gaps
                await asyncio.wait_for(self._wake.wait(), min(self._settings.gap_timeout_s / 4, 5.0))
            self._wake.clear()
        if engine.lost.done():
            raise EngineLost(engine.lost.result())
        if self._broken is not None:
            raise Interrupted(f"an outcome could not be stored: {self._broken}") from self._broken

    async def _open_runs(self) -> None:
        """Read the ends of logs that have got an operation and are not known here yet."""
        while self._unopened:
            run_id = next(iter(self._unopened))
            run = await self._store.runs.get(run_id)
            entries = await self._store.futures.of_run_from(run_id, run.next_seq) if run is not None else []
            arrived = self._unopened.pop(run_id)  # also what came while the log was being read
            if run is not None and run_id not in self._queue.runs:
                self._queue.open_run(run_id, run.owner, run.next_seq, ())
            for future in [*entries, *arrived]:
                self.accept(future)

    async def _drop_runs(self, engine: EngineProcess) -> None:
        while self._to_drop:
            run_id = self._to_drop.pop()
            if run_id in self.resident:
                self.resident.discard(run_id)
                await engine.drop_run(run_id)

    async def _claim(self, engine: EngineProcess, batch: list[Future]) -> list[tuple[Future, bytes]]:
        """The next operation of each of several runs, all of one kind, with their inputs."""
        epoch = engine.config.epoch
        inputs = await self._claimed_inputs(Claim(tuple(future.request_id for future in batch), epoch))
        if len(inputs) < len(batch):
            raise Interrupted("an operation that was to be claimed has its outcome already, or a newer owner")
        claimed = [sent(future, epoch) for future in batch]
        return [(future, inputs[future.request_id]) for future in claimed]

    async def _claimed_inputs(self, claim: Claim) -> dict[str, bytes]:
        """Inputs of what is claimed. When they are at hand, the claim is written while the engine works already: it
        counts attempts and shows what runs, whereas settling decides whose outcome is stored."""
        inputs = self._inputs.take(claim.request_ids)
        if inputs is None:
            return await self._store.futures.claim(claim)
        self._store.futures.claim_behind(claim).add_done_callback(self._written)
        return inputs

    async def _call(self, engine: EngineProcess, batch: list[tuple[Future, bytes]]) -> list[Outcome]:
        """Have the engine perform a batch, after giving it the runs that it does not have."""
        outcomes: list[Outcome] = []
        ready: list[tuple[Future, bytes]] = []
        for future, body in batch:
            refusal = worn_out(future, self._settings) or await self._make_resident(engine, future)
            if refusal is not None:
                outcomes.append(refusal)
            else:
                ready.append((future, body))
        if ready:
            outcomes += await self._perform(engine, ready)
        return outcomes

    async def _perform(self, engine: EngineProcess, batch: list[tuple[Future, bytes]]) -> list[Outcome]:
        futures = [future for future, _ in batch]
        kind: OperationKind = futures[0].kind  # type: ignore[assignment]
        addresses = [RunAddress(future.run_id or "", future.seq_id) for future in futures]
        performed, payloads = await engine.perform(kind, addresses, [body for _, body in batch])
        if performed.lost_runs and len(batch) > 1:
            return await self._perform_each(engine, batch)
        outcomes = outcomes_of(futures, performed, payloads)
        if kind == "create_run":
            self.resident.update(outcome.future.run_id or "" for outcome in outcomes if not outcome.failed)
        self.resident.difference_update(performed.lost_runs)
        return outcomes

    async def _perform_each(self, engine: EngineProcess, batch: list[tuple[Future, bytes]]) -> list[Outcome]:
        """A call for several runs broke, and none of them is to blame for the others: each again, alone."""
        outcomes: list[Outcome] = []
        for future, body in batch:
            self.resident.discard(future.run_id or "")
            refusal = await self._make_resident(engine, future)
            outcomes += [refusal] if refusal is not None else await self._perform(engine, [(future, body)])
        return outcomes

    async def _make_resident(self, engine: EngineProcess, future: Future) -> Outcome | None:
        """See to it that the engine has the run; an outcome if that is impossible."""
        run_id = future.run_id or ""
        if run_id in self.resident or future.kind == "create_run":
            return None
        try:
            await restore_run(self._store, engine, run_id, future.seq_id)
        except RestoreFailed as error:
            return failed(future, error.category, str(error))
        self.resident.add(run_id)
        return None

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Store the outcomes. Each run's next operation may be claimed at once: writes keep their order."""
        for outcome in outcomes:
            if self._sealing.takes(outcome):
                self._sealing.start(outcome, self._settle_one)
            else:
                self._settle_one(outcome)

    def _settle_one(self, outcome: Outcome) -> None:
        self._queue.settled(outcome.future)
        self._write(outcome)
        self._wake.set()

    def _fail_gaps(self) -> None:
        """What waits behind a number that does not come fails; nothing is skipped silently."""
        timeout_s = self._settings.gap_timeout_s
        for queue in self._queue.gaps(asyncio.get_running_loop().time(), timeout_s):
            missing = queue.next_seq
            for future in queue.abandon_gap():
                message = (
                    f"operation {missing} of run {queue.run_id} has not arrived within {timeout_s:.0f} s, "
                    f"so operation {future.seq_id}, which comes after it, was not performed"
                )
                self._write(failed(future, "user", message))

    def _fail_late(self, queue: RunQueue, future: Future) -> None:
        """An operation whose turn is over: its number was given up, or it was sent under another name before."""
        if future.open:
            message = (
                f"operation {future.seq_id} of run {queue.run_id} came after operation {queue.next_seq - 1} had been "
                "settled, so it was not performed"
            )
            self._write(failed(future, "user", message))

    def _write(self, outcome: Outcome) -> None:
        self._inputs.discard(outcome.future.request_id)
        self._store.futures.settle(outcome, self._settled).add_done_callback(self._written)

    def _settled(self, settled: Settled | None) -> None:
        if settled is None:
            self._broken = Interrupted("its epoch is over")
        self._on_settled(settled)

    def _written(self, write: asyncio.Future[Any]) -> None:
        if not write.cancelled() and isinstance(error := write.exception(), Exception):
            self._broken = error
            self._wake.set()


def sent(future: Future, epoch: int) -> Future:
    """The future as a claim leaves it: an attempt is a start of the engine that it was sent to."""
    return replace(future, epoch=epoch, attempts=future.attempts + (future.epoch != epoch))


def worn_out(future: Future, settings: Settings) -> Outcome | None:
    """A call that engines keep dying over fails, so that everything else can go on."""
    if future.attempts <= settings.max_attempts:
        return None
    deaths = future.attempts - 1
    log.error("%s failed: the engine died %d times while it was performed", future.request_id, deaths)
    return failed(future, "server", f"the engine died {deaths} times while it performed this operation")
