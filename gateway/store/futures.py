"""Futures: accept, claim, look up. Outcomes are stored by `gateway.store.settling`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, case, delete, func, select, update

from gateway.store import at_once, schema
from gateway.store.audit import record
from gateway.store.checkpoints import record_read, require_checkpoints
from gateway.store.database import AtOnce, Database
from gateway.store.dialect import NO_FILTERS, Filters, insert_new, insert_or_ignore, now
from gateway.store.leases import newest_epoch
from gateway.store.notices import Notice
from gateway.store.records import (
    AuditTopic,
    Future,
    FutureStatus,
    Outcome,
    Reference,
    Run,
    Sampler,
    Session,
    Settled,
)
from gateway.store.runs import insert_runs
from gateway.store.settling import one_statement_settles, settle_again, settle_futures

F = schema.futures
OPEN = (FutureStatus.QUEUED, FutureStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Submission:
    """A call to accept: its future, its input's bytes, and the run that begins with it, if one does.

    A future that is failed already is recorded as such: a rejected operation consumes its number. `needs` is the
    checkpoint that the call begins at or loads.
    """

    future: Future
    body: bytes
    run: Run | None = None
    needs: Reference | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """Futures to be sent to the engine of `epoch`. Samples must still be those of `engine`: they may have moved to
    another one; a run's operations never do."""

    request_ids: tuple[str, ...]
    epoch: int
    engine: str | None = None


class Queued(NamedTuple):
    """How much of an owner's waits, of one run (None: samples); its highest number, and the bytes of its inputs."""

    owner: str
    run_id: str | None
    waiting: int
    last: int
    input_bytes: int


@dataclass(slots=True)
class _ClaimBehind:
    """A claim that has not been written yet, less what is settled meanwhile."""

    request_ids: set[str]
    epoch: int
    engine: str | None
    written: asyncio.Future[None] | None = None


# Statements of the busiest paths are built once: building one costs as much as executing it.
_CLAIM = (
    update(F)
    .where(
        F.c.request_id.in_(bindparam("keys", expanding=True)),
        F.c.status.in_(OPEN),
        F.c.engine == func.coalesce(bindparam("by_engine", type_=F.c.engine.type), F.c.engine),
        F.c.epoch.is_(None) | (F.c.epoch <= bindparam("by_epoch")),
        func.coalesce(newest_epoch(F.c.engine), 0) <= bindparam("by_epoch"),
    )
    .values(
        status=FutureStatus.RUNNING,
        epoch=bindparam("by_epoch"),
        attempts=F.c.attempts + case((F.c.epoch == bindparam("by_epoch"), 0), else_=1),
        started_at=bindparam("at"),
    )
    .returning(F.c.request_id)
)
_INPUTS = select(schema.inputs).where(schema.inputs.c.request_id.in_(bindparam("keys", expanding=True)))


class FutureStore:
    """The futures of all owners."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._behind: dict[str, _ClaimBehind] = {}

    async def submit(
        self,
        submission: Submission,
        then: Callable[[bool], None] | None = None,
        notice: Notice | None = None,
    ) -> bool:
        """Accept a call; whether it is new. Repeating a known natural key changes nothing.

        `then` is called with the same answer right after the commit, which tells other gateways the `notice`. Raises
        NotFound, and accepts nothing, when the checkpoint that the call needs has gone since it was looked up.
        """
        return await self._database.write(_SUBMIT, submission, then, notice=notice)

    async def claim(self, claim: Claim) -> dict[str, bytes]:
        """Mark futures as running; return the inputs of those that could be, by request_id."""
        return await self._database.write(claim_futures, claim, recomputable=True, again=claim_futures)

    def claim_behind(self, claim: Claim) -> asyncio.Future[None]:
        """Mark futures as running whose inputs are at hand; settling finds out whether they could be.

        What is settled before the mark has been written needs none: the outcome counts the attempt.
        """
        behind = _ClaimBehind(set(claim.request_ids), claim.epoch, claim.engine)
        self._behind.update(dict.fromkeys(claim.request_ids, behind))
        behind.written = written = self._database.write_behind(mark_futures, behind, again=mark_futures)
        written.add_done_callback(lambda _: self._forget(claim.request_ids, behind))
        return written

    def _forget(self, request_ids: Sequence[str], behind: _ClaimBehind) -> None:
        for request_id in request_ids:
            if self._behind.get(request_id) is behind:
                del self._behind[request_id]

    async def requeue(self, engine: str, epoch: int) -> None:
        """What was sent to an engine before this epoch is there no more: it waits again. A run whose next operation
        waits behind another one that seems to run could not go on."""
        await self._database.write(requeue_futures, (engine, epoch), recomputable=True, again=requeue_futures)

    async def count_deaths(self, request_ids: Sequence[str]) -> None:
        """An engine has died while it performed these."""
        if request_ids:
            await self._database.write(count_deaths, request_ids)

    def settle(
        self, outcome: Outcome, then: Callable[[Settled | None], None] | None = None
    ) -> asyncio.Future[Settled | None]:
        """Store an outcome and what comes with it; None if the future was not this epoch's to settle.

        Takes effect before any claim that is called after it, without having to be awaited first. A connection that is
        cut meanwhile changes nothing: the outcome is stored once, and answered so. A failure may come from outside the
        log, such as a gap that stayed open for too long: it is flushed.
        """
        behind = self._behind.pop(outcome.future.request_id, None)
        if behind is not None:
            behind.request_ids.discard(outcome.future.request_id)
            if not behind.request_ids and behind.written is not None:
                behind.written.cancel()
        notice = Notice("settled", outcome.future.request_id)
        return self._database.write(
            _SETTLE,
            outcome,
            then,
            recomputable=not outcome.failed,
            notice=notice,
            again=settle_again,
        )

    async def give_up(self, request_id: str, message: str) -> None:
        """Fail a sample that is still open, whatever gateway has it in hand: that one's outcome is refused then."""
        notice = Notice("settled", request_id)
        await self._database.write(give_up_samples, (request_id, message), notice=notice)

    async def get(self, request_id: str) -> Future | None:
        row = await self._database.first(select(F).where(F.c.request_id == request_id))
        return future_of(row) if row is not None else None

    async def many(self, request_ids: Sequence[str]) -> list[Future]:
        """The futures of some ids, in no order."""
        return await self._all(select(F).where(F.c.request_id.in_(request_ids)))

    async def settled_of(self, request_ids: Sequence[str]) -> list[Settled]:
        """Those of some futures that have their outcome, with their results."""
        results = schema.results
        query = (
            select(F, results.c.body)
            .outerjoin(results, results.c.request_id == F.c.request_id)
            .where(F.c.request_id.in_(request_ids), F.c.status.not_in(OPEN))
        )
        found = []
        for row in await self._database.rows(query):
            values = dict(row._mapping)
            body = values.pop("body")
            found.append(Settled(Future(**{**values, "status": FutureStatus(values["status"])}), body))
        return found

    async def open_ids(self, engine: str, since: float) -> list[str]:
        """Ids of what was accepted for an engine at `since` or later and is open."""
        query = select(F.c.request_id).where(F.c.engine == engine, schema.OPEN, F.c.created_at >= since)
        return [row.request_id for row in await self._database.rows(query)]

    async def queues(self, engine: str) -> list[Queued]:
        """What waits for an engine, counted by owner and run; samples belong to none."""
        query = (
            select(
                F.c.owner,
                F.c.run_id,
                func.count().label("waiting"),
                func.max(F.c.seq_id).label("last"),
                func.sum(F.c.input_bytes).label("input_bytes"),
            )
            .where(F.c.engine == engine, schema.OPEN)
            .group_by(F.c.owner, F.c.run_id)
        )
        return [
            Queued(row.owner, row.run_id, row.waiting, row.last, int(row.input_bytes))
            for row in await self._database.rows(query)
        ]

    async def result(self, request_id: str) -> bytes | None:
        """The stored result of a future that is done."""
        query = select(schema.results.c.body).where(schema.results.c.request_id == request_id)
        row = await self._database.first(query)
        return row.body if row is not None else None

    async def inputs(self, request_ids: Iterable[str]) -> dict[str, bytes]:
        """Inputs by request_id."""
        query = select(schema.inputs).where(schema.inputs.c.request_id.in_(list(request_ids)))
        return {row.request_id: row.body for row in await self._database.rows(query)}

    async def input_at(self, run_id: str, seq_id: int) -> bytes | None:
        """The input of the operation with this number in a run's log, if it is there."""
        inputs = schema.inputs
        query = select(inputs.c.body).join(F, F.c.request_id == inputs.c.request_id)
        row = await self._database.first(query.where(F.c.run_id == run_id, F.c.seq_id == seq_id))
        return row.body if row is not None else None

    async def open_of_engine(self, engine: str) -> list[Future]:
        """What an engine still owes, oldest first."""
        query = select(F).where(F.c.engine == engine, schema.OPEN).order_by(F.c.created_at)
        return await self._all(query)

    async def of_run_from(self, run_id: str, seq_id: int) -> list[Future]:
        """The entries of a log from a number on, in order, whatever became of them; and older ones that are open."""
        unsettled = (F.c.seq_id >= seq_id) | F.c.status.in_(OPEN)
        return await self._all(select(F).where(F.c.run_id == run_id, unsettled).order_by(F.c.seq_id))

    async def next_number(self, run_id: str) -> int:
        """The first number of a log that no entry has had, nor any entry behind it."""
        newest = select(func.coalesce(func.max(F.c.seq_id), 0)).where(F.c.run_id == run_id)
        next_seq = select(schema.runs.c.next_seq).where(schema.runs.c.run_id == run_id)
        query = select(newest.scalar_subquery().label("newest"), next_seq.scalar_subquery().label("next_seq"))
        [row] = await self._database.rows(query)
        return max(int(row.newest) + 1, row.next_seq or 0)

    async def applied_to_run(
        self, run_id: str, after: int, before: int, kinds: Sequence[str], limit: int
    ) -> list[Future]:
        """Operations of a log that took effect, in order, with after < seq_id < before."""
        query = (
            select(F)
            .where(F.c.run_id == run_id, F.c.seq_id > after, F.c.seq_id < before)
            .where(F.c.status == FutureStatus.DONE, F.c.kind.in_(kinds))
            .order_by(F.c.seq_id)
            .limit(limit)
        )
        return await self._all(query)

    async def page(
        self, *, limit: int, before: tuple[float, str] | None = None, where: Filters = NO_FILTERS
    ) -> list[Future]:
        """Newest first; `where` filters by column; `before` is (created_at, request_id) of the last row seen."""
        query = select(F).order_by(F.c.created_at.desc(), F.c.request_id.desc()).limit(limit)
        for column, value in where.items():
            if value is not None:
                query = query.where(F.c[column] == value)
        if before is not None:
            created_at, request_id = before
            older = (F.c.created_at == created_at) & (F.c.request_id < request_id)
            query = query.where((F.c.created_at < created_at) | older)
        return await self._all(query)

    async def finished_of_sampler(
        self, sampler: Sampler, numbers: range, *, since: float, limit: int
    ) -> list[Future]:
        """The newest samples with such numbers that were finished at `since` or later, oldest first.

        Found by their owner and time, for which there is an index.
        """
        query = (
            select(F)
            .where(F.c.owner == sampler.owner, F.c.created_at >= sampler.created_at)
            .where(F.c.sampler_id == sampler.sampler_id, F.c.seq_id.between(numbers.start, numbers.stop - 1))
            .where(F.c.status.not_in(OPEN), F.c.finished_at >= since)
            .order_by(F.c.finished_at.desc())
            .limit(limit)
        )
        return (await self._all(query))[::-1]

    async def of_session(self, session: Session, limit: int) -> list[Future]:
        """The newest calls of a session's runs and samplers, oldest first."""
        runs = select(schema.runs.c.run_id).where(schema.runs.c.session_id == session.session_id)
        samplers = select(schema.samplers.c.sampler_id).where(
            schema.samplers.c.session_id == session.session_id
        )
        query = (
            select(F)
            .where(F.c.owner == session.owner, F.c.created_at >= session.created_at)
            .where(F.c.run_id.in_(runs) | F.c.sampler_id.in_(samplers))
            .order_by(F.c.created_at.desc())
            .limit(limit)
        )
        return (await self._all(query))[::-1]

    async def counts(self) -> dict[tuple[str, str], int]:
        """How many open futures there are by (engine, status)."""
        query = select(F.c.engine, F.c.status, func.count().label("open")).where(schema.OPEN)
        rows = await self._database.rows(query.group_by(F.c.engine, F.c.status))
        return {(str(row.engine), str(row.status)): int(row.open) for row in rows}

    async def _all(self, query: Select[Any]) -> list[Future]:
        return [future_of(row) for row in await self._database.rows(query)]


def future_of(row: Row[Any]) -> Future:
    """The record of a row."""
    values = dict(row._mapping)
    return Future(**{**values, "status": FutureStatus(values["status"])})


def insert_submissions(connection: Connection, submissions: list[Submission]) -> list[bool]:
    """Runs, futures and inputs of several submissions; whether each is new. What comes twice is new once."""
    runs = [submission.run for submission in submissions if submission.run is not None]
    if runs:
        insert_runs(connection, runs)
    first = {submission.future.request_id: submission for submission in reversed(submissions)}
    insert = _insert_in_two if connection.dialect.name == "sqlite" else _insert_at_once
    new = insert(connection, list(first.values()))
    require_checkpoints(
        connection, [s.needs for s in first.values() if s.future.request_id in new and s.needs]
    )
    for submission in first.values():
        if submission.future.request_id in new:
            _record_in_audit(connection, submission)
    return [
        first[submission.future.request_id] is submission and submission.future.request_id in new
        for submission in submissions
    ]


def _insert_at_once(connection: Connection, submissions: Sequence[Submission]) -> set[str]:
    return at_once.insert_futures(
        connection, [(each.future, each.body if each.future.open else None) for each in submissions]
    )


def _insert_in_two(connection: Connection, submissions: Sequence[Submission]) -> set[str]:
    """SQLite has no statement that changes two tables."""
    rows = [asdict(submission.future) for submission in submissions]
    new = set(connection.execute(insert_new(connection.dialect.name, F, "request_id"), rows).scalars())
    bodies = [
        {"request_id": submission.future.request_id, "body": submission.body}
        for submission in submissions
        if submission.future.open and submission.future.request_id in new
    ]
    if bodies:
        connection.execute(insert_or_ignore(connection, schema.inputs), bodies)
    return new


def _one_statement_accepts(submissions: Sequence[Submission]) -> bool:
    return all(submission.run is None and submission.needs is None for submission in submissions)


def _record_in_audit(connection: Connection, submission: Submission) -> None:
    """What begins a run or takes weights; other operations are in the run's log."""
    if submission.needs is not None:
        record_read(connection, submission.future.owner, submission.needs, "training")
    if (run := submission.run) is not None:
        details = {"training_run_id": run.run_id, "session_id": run.session_id, "base_model": run.base_model}
        record(connection, run.owner, AuditTopic.RUNS, "run_created", **details)


def claim_futures(connection: Connection, claims: list[Claim]) -> list[dict[str, bytes]]:
    """Queued futures become running; running ones of an older epoch are taken over."""
    answers = []
    for claim in claims:
        claimed = _mark_running(connection, claim.request_ids, claim.epoch, claim.engine)
        bodies = connection.execute(_INPUTS, {"keys": claimed})
        answers.append({row.request_id: row.body for row in bodies})
    return answers


def mark_futures(connection: Connection, claims: list[_ClaimBehind]) -> list[None]:
    """The same without reading the inputs, those of one epoch in one statement."""
    for (epoch, engine), group in groupby(claims, key=lambda claim: (claim.epoch, claim.engine)):
        if request_ids := [key for claim in group for key in tuple(claim.request_ids)]:
            _mark_running(connection, request_ids, epoch, engine)
    return [None] * len(claims)


def count_deaths(connection: Connection, groups: list[Sequence[str]]) -> list[None]:
    """One more death of an engine for each of the futures that are still open."""
    dead = [request_id for group in groups for request_id in group]
    still_open = F.c.request_id.in_(dead) & F.c.status.in_(OPEN)
    connection.execute(update(F).where(still_open).values(deaths=F.c.deaths + 1))
    return [None] * len(groups)


def requeue_futures(connection: Connection, claims: list[tuple[str, int]]) -> list[None]:
    for engine, epoch in claims:
        stale = (F.c.engine == engine) & (F.c.status == FutureStatus.RUNNING) & (F.c.epoch < epoch)
        connection.execute(update(F).where(stale).values(status=FutureStatus.QUEUED))
    return [None] * len(claims)


def give_up_samples(connection: Connection, given_up: list[tuple[str, str]]) -> list[None]:
    for request_id, message in given_up:
        still_open = (F.c.request_id == request_id) & F.c.status.in_(OPEN) & (F.c.kind == "sample")
        values = {
            "status": FutureStatus.FAILED,
            "error": message,
            "error_category": "user",
            "finished_at": now(),
        }
        failed = update(F).where(still_open).values(values).returning(F.c.request_id)
        ids = list(connection.execute(failed).scalars())
        connection.execute(delete(schema.inputs).where(schema.inputs.c.request_id.in_(ids)))
    return [None] * len(given_up)


def _mark_running(
    connection: Connection, request_ids: Sequence[str], epoch: int, engine: str | None
) -> Sequence[str]:
    values = {"keys": request_ids, "by_epoch": epoch, "by_engine": engine, "at": now()}
    return connection.execute(_CLAIM, values).scalars().all()


_SUBMIT = AtOnce(insert_submissions, _one_statement_accepts)
_SETTLE = AtOnce(settle_futures, one_statement_settles)
