"""The lane of the runs' operations: claim → call → settle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from engines import messages
from engines.messages import RunAddress
from engines.operations import OperationKind
from gateway.dispatch.blame import Blame
from gateway.dispatch.claiming import Interrupted, claimed_inputs, sent
from gateway.dispatch.inputs import RecentInputs
from gateway.dispatch.outcomes import failed, outcomes_of
from gateway.dispatch.quarantine import Quarantine
from gateway.dispatch.recovery import size_of
from gateway.dispatch.residency import Residency
from gateway.dispatch.returning import Returning
from gateway.dispatch.room import QueuedBytes, owner_load, require_room, run_load
from gateway.dispatch.run_queue import RunQueue, TrainingQueue
from gateway.dispatch.sealing import Sealing
from gateway.dispatch.snapshots import Snapshots
from gateway.dispatch.standing import Standing
from gateway.dispatch.weighing import weight
from gateway.engine_process import EngineProcess
from gateway.errors import EngineLost
from gateway.settings import Settings
from gateway.snapshot_files import SnapshotFiles
from gateway.store import Store
from gateway.store.futures import Claim
from gateway.store.records import Future, Outcome, Settled

log = logging.getLogger(__name__)


class TrainingLane:
    """The operations of all runs of one engine, each run's in order."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        on_settled: Callable[[Settled | None], None],
        blame: Blame,
    ) -> None:
        self._store = store
        self._blame = blame
        self._settings = settings
        self._on_settled = on_settled
        self._queue = TrainingQueue()
        self._unopened: dict[str, list[Future]] = {}
        self.queued = QueuedBytes()
        self._inputs = RecentInputs(settings.input_cache_bytes)
        self._broken: Exception | None = None
        self._closed = False
        self._wake = asyncio.Event()
        self._to_drop: set[str] = set()
        self._epoch: int | None = None
        self._sealing = Sealing(settings)
        self._files = SnapshotFiles(settings)
        self.snapshots = Snapshots(store, settings, self._files, self._wake.set)
        self.residency = Residency()
        self._returning = Returning(store, self._files, self.snapshots, self.residency, blame, self)
        self.in_engine: tuple[str, ...] = ()
        self.restoring: str | None = None

    def accept(self, future: Future, body: bytes | None = None) -> None:
        """Queue an operation that has become durable; `body` is its input where that is at hand."""
        run_id = future.run_id or ""
        self.queued.add(future)
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
        self.queued.clear()
        self._inputs.clear()
        self._broken = None
        self._to_drop.clear()
        self._sealing.cancel()
        self.snapshots.reset()
        self._returning.reset()
        self.residency.reset()
        self.in_engine = ()
        self.restoring = None

    def close(self) -> None:
        """Begin nothing any more; `feed` ends when the call at hand has."""
        self._closed = True
        self._wake.set()

    def reopen(self, future: Future) -> None:
        """There is an open operation of a run in the database."""
        self.queued.add(future)
        self._unopened.setdefault(future.run_id or "", [])
        self._wake.set()

    def drop(self, run_id: str) -> None:
        """Free a run's memory once nothing of it waits; its log stays, and a later operation restores it."""
        self._to_drop.add(run_id)
        self._wake.set()

    def standing(self, future: Future) -> Standing:
        """Where an open operation stands."""
        queue = self._queue.runs.get(future.run_id or "")
        if queue is None:
            return Standing(False, "its run is being restored")
        if self._returning.waits_for_storage(queue.run_id) and future.seq_id == queue.next_seq:
            return Standing(True, "its run waits for its snapshots, whose storage is out of reach")
        return queue.standing(future.seq_id)

    def require_room(self, future: Future) -> None:
        """Raises TooManyRequests when the queue of the run or of its owner is full.

        What comes before something that waits is taken all the same: the chunks of one call are sent in any order, and
        those that are here would wait for it for ever.
        """
        others = (len(each) for each in self._unopened.values() if each and each[0].owner == future.owner)
        loads = (
            run_load(future.run_id or "", len(self._waiting(future)), self._settings),
            owner_load(self._queue.load[future.owner] + sum(others), self._settings),
        )
        require_room(loads, lambda: self.awaited(future))

    def awaited(self, future: Future) -> bool:
        """Whether an operation comes before one of its run that waits here."""
        return future.seq_id <= max(self._waiting(future), default=-1)

    def _waiting(self, future: Future) -> Collection[int]:
        """Numbers of what waits of the same run."""
        queue = self._queue.runs.get(future.run_id or "")
        if queue is not None:
            return queue.waiting
        return [other.seq_id for other in self._unopened.get(future.run_id or "", ())]

    async def feed(self, engine: EngineProcess, quarantine: Quarantine) -> None:
        """Until the lane is closed. Raises EngineLost, and Interrupted when what is in memory cannot be trusted."""
        self._epoch = engine.config.epoch
        for run_id in self.residency.begin(engine.info.run_memory_bytes):
            await engine.drop_run(run_id)
        self.snapshots.serve(engine)
        info = engine.info
        weigh = partial(weight, self._inputs, packs=not info.deterministic, pass_tokens=info.pass_tokens)
        while True:
            await self._work_or_time(engine)
            if self._closed:
                await self._sealing.finish()
                await self.snapshots.take_all()
                return
            await self._open_runs()
            await self._drop_runs(engine)
            self._fail_gaps()
            await self._change_places(engine)
            batch = self._queue.take_batch(weigh)
            if batch:
                await quarantine.enter(alone=self._blame.suspected(batch[0]))
                await self._advance(engine, batch)
                quarantine.leave()

    async def _advance(self, engine: EngineProcess, batch: list[Future]) -> None:
        """Perform what the engine has the runs for; bring a run that it lacks a piece nearer."""
        ready: list[Future] = []
        for future in batch:
            if (refusal := self._blame.worn_out(future)) is not None:
                self.settle(refusal)
            elif not self.residency.claim(future.run_id or "", future.owner):
                self._queue.park(future)
            elif future.kind == "create_run" or self.residency.holds(future.run_id or ""):
                ready.append(future)
            else:
                self.restoring = future.run_id
                await self._returning.advance(engine, future)
                self.restoring = None
        if ready:
            self.in_engine = tuple(future.request_id for future in ready)
            await self._perform(engine, await self._claim(engine, ready))
        self.in_engine = ()

    async def _work_or_time(self, engine: EngineProcess) -> None:
        """Wait until there may be something to do: an operation, a broken write, or a gap to look after."""
        if not (self._queue or self._unopened or self._broken or self._closed):
            patience_s = min(self._settings.gap_timeout_s / 4, 5.0, self.residency.look_again_s)
            with contextlib.suppress(TimeoutError):  # then it is time to look at the gaps, or at the places
                # Not wait_for, which before Python 3.12 loses a cancellation that comes with what it waits for.
                async with asyncio.timeout(patience_s):
                    await self._wake.wait()
            self._wake.clear()
        if engine.lost.done():
            raise EngineLost(engine.lost.result())
        if self._broken is not None:
            raise Interrupted(f"an outcome could not be stored: {self._broken}") from self._broken

    async def _open_runs(self) -> None:
        """Read the ends of logs that have got an operation and are not known here yet."""
        while self._unopened:
            # A run that was known before may have outcomes that are on their way.
            await self.require_settled()
            for run_id in list(self._unopened):
                run = await self._store.runs.get(run_id)
                entries = (
                    await self._store.futures.of_run_from(run_id, run.next_seq) if run is not None else []
                )
                arrived = self._unopened.pop(run_id)  # also what came while the log was being read
                if run is not None and run_id not in self._queue.runs:
                    self._queue.open_run(run_id, run.owner, run.next_seq, ())
                for future in [*entries, *arrived]:
                    self.accept(future)

    async def _drop_runs(self, engine: EngineProcess) -> None:
        for run_id in [run_id for run_id in self._to_drop if not self._queue.waits(run_id)]:
            if self.snapshots.crowded:
                return
            self._to_drop.discard(run_id)
            if self.residency.leave(run_id):
                await self._free(engine, run_id)
            self._forget_idle(run_id)

    async def _change_places(self, engine: EngineProcess) -> None:
        """Let runs that wait for the engine's memory have the places of others, as far as those may leave now."""
        while not self.snapshots.crowded:
            change = self.residency.change(self._queue.busy, engine_idle=not self._queue)
            if change is None:
                return
            for run_id in change.leaving:
                await self._free(engine, run_id)
                self._forget_idle(run_id)
            if not self._queue.unpark(change.run_id):
                self.residency.leave(change.run_id)

    async def _free(self, engine: EngineProcess, run_id: str) -> None:
        await self.snapshots.leave(run_id)
        await engine.drop_run(run_id)

    def _forget_idle(self, run_id: str) -> None:
        """What is known of a run takes memory too; when it gets something to do, the end of its log is read again."""
        if not self.residency.holds(run_id):
            self._queue.forget(run_id)

    async def _claim(self, engine: EngineProcess, batch: list[Future]) -> list[tuple[Future, bytes]]:
        """The next operation of each of several runs, all of one kind, with their inputs."""
        epoch = engine.config.epoch
        claim = Claim(tuple(future.request_id for future in batch), epoch)
        inputs = await claimed_inputs(self._store.futures, self._inputs, claim, self._written)
        if len(inputs) < len(batch):
            raise Interrupted("an operation that was to be claimed has its outcome already, or a newer owner")
        claimed = [sent(future, epoch) for future in batch]
        return [(future, inputs[future.request_id]) for future in claimed]

    async def _perform(self, engine: EngineProcess, batch: list[tuple[Future, bytes]]) -> None:
        futures = [future for future, _ in batch]
        kind: OperationKind = futures[0].kind  # type: ignore[assignment]
        addresses = [RunAddress(future.run_id or "", future.seq_id) for future in futures]
        self.snapshots.moving(futures)
        performed, payloads = await engine.perform(kind, addresses, [body for _, body in batch])
        for run_id in performed.lost_runs:
            self.residency.leave(run_id)
            self.snapshots.forget(run_id)
        answered: list[tuple[Future, messages.Outcome]] = []
        for future, answer in zip(futures, performed.outcomes, strict=True):
            if future.run_id in performed.lost_runs and len(batch) > 1:
                self._queue.put_back(future, alone=True)  # none is to blame for the others: each again, alone
                continue
            if (size := performed.no_room.get(future.run_id or "")) is not None:
                self.refused(future, size)
                continue
            answered.append((future, answer))
            if answer.failure is None and kind == "create_run":
                self.residency.fill(future.run_id or "", size_of(answer))
            elif answer.failure is None:
                self.residency.use(future.run_id or "", kind)
        performed = msgspec.structs.replace(performed, outcomes=[answer for _, answer in answered])
        futures = [future for future, _ in answered]
        outcomes = outcomes_of(futures, engine.config.base_model, performed, payloads)
        self._settle(outcomes)
        await self.snapshots.performed(outcomes)

    def refused(self, future: Future, size: int) -> None:
        """The engine has no room for the run: others have to leave first."""
        if self.residency.refused(future.run_id or "", size):
            self._queue.put_back(future)
            return
        message = f"the engine has no memory for the run, {size} bytes, though no other run is in it"
        self.settle(failed(future, "server", message))

    def put_back(self, future: Future) -> None:
        """What was taken is still to be done; its run may go on now."""
        self._queue.put_back(future)
        self._wake.set()

    async def require_settled(self) -> None:
        """Wait until every outcome that was handed to the database is in it: a log is read up to its last one."""
        await self._store.database.barrier()
        if self._broken is not None:
            raise Interrupted(f"an outcome could not be stored: {self._broken}") from self._broken

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Store the outcomes. Each run's next operation may be claimed at once: writes keep their order."""
        for outcome in outcomes:
            if self._sealing.takes(outcome):
                self._sealing.start(outcome, self.settle)
            else:
                self.settle(outcome)

    def settle(self, outcome: Outcome) -> None:
        """Store an outcome, and let the run go on."""
        self._queue.settled(outcome.future)
        if not self.residency.holds(outcome.future.run_id or ""):
            self.residency.leave(outcome.future.run_id or "")  # its place was reserved, and is not needed now
        self._write(outcome)
        self._forget_idle(outcome.future.run_id or "")
        self._wake.set()

    def _fail_gaps(self) -> None:
        """What waits behind a number that does not come fails; nothing is skipped silently."""
        timeout_s = self._settings.gap_timeout_s
        for queue in self._queue.gaps(asyncio.get_running_loop().time(), timeout_s):
            missing = queue.next_seq
            for future in self._queue.abandon_gap(queue):
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
        fenced = replace(outcome, fence=self._epoch)
        self._store.futures.settle(fenced, self._settled).add_done_callback(self._written)

    def _settled(self, settled: Settled | None) -> None:
        if settled is None:
            self._broken = Interrupted("its epoch is over")
        else:
            self.queued.remove(settled.future.request_id)
        self._on_settled(settled)

    def _written(self, write: asyncio.Future[Any]) -> None:
        if not write.cancelled() and isinstance(error := write.exception(), Exception):
            self._broken = error
            self._wake.set()
