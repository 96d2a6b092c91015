"""Settling: the outcome of a future and all that comes with it, in one transaction.

The future's own row decides, and its engine's lease: if it is not open, has moved to another engine, or was claimed in
a newer epoch than the outcome belongs to, or the lease was taken in a newer one, somebody else has taken over and
nothing of the outcome is stored. That is the whole of the fence on the database's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, delete, insert, literal, select, update

from engines.operations import CHANGES_STATE
from gateway.store import at_once, schema
from gateway.store.checkpoints import folder_in_use, insert_checkpoint
from gateway.store.dialect import insert_or_ignore, now
from gateway.store.leases import newest_epoch
from gateway.store.records import Checkpoint, Future, FutureStatus, Outcome, RunStatus, Sampler, Settled
from gateway.store.samplers import described, insert_sampler
from gateway.store.usage import count_outcomes, counted, this_hour

F = schema.futures
R = schema.runs

_SAME_EPOCH = F.c.epoch.is_not_distinct_from(bindparam("to_epoch", type_=F.c.epoch.type))
"""The claim has been written. It need not have been: an outcome that comes first counts its attempt itself."""

_SETTLE_FUTURE = (
    update(F)
    .where(F.c.request_id == bindparam("key"))
    .values(
        status=bindparam("to_status"),
        epoch=bindparam("to_epoch"),
        attempts=F.c.attempts + case((_SAME_EPOCH, 0), else_=1),
        started_at=case((_SAME_EPOCH, F.c.started_at), else_=bindparam("to_started_at")),
        error=bindparam("to_error"),
        error_category=bindparam("to_error_category"),
        error_id=bindparam("to_error_id"),
        result_digest=bindparam("to_result_digest"),
        measure=bindparam("to_measure"),
        finished_at=bindparam("at"),
    )
)

_OPEN = (
    select(
        F.c.request_id,
        F.c.status,
        F.c.engine,
        F.c.epoch,
        F.c.run_id,
        R.c.next_seq,
        newest_epoch(F.c.engine).label("newest"),
    )
    .outerjoin(R, R.c.run_id == F.c.run_id)
    .where(F.c.request_id.in_(bindparam("keys", expanding=True)))
)
_OPEN_LOCKED = _OPEN.with_for_update(of=F)
_BEFORE = (
    select(F.c.request_id)
    .where(F.c.run_id == bindparam("run"), F.c.seq_id >= bindparam("first"), F.c.seq_id < bindparam("seq"))
    .where(schema.OPEN)
    .limit(1)
)

_DELETE_INPUTS = delete(schema.inputs).where(
    schema.inputs.c.request_id.in_(bindparam("keys", expanding=True))
)
"""Of what no replay applies again; it was kept for another engine in case the first one dies."""

_RECORD_STEP = insert(schema.steps).from_select(
    ["run_id", "step", "seq_id", "loss", "tokens", "grad_norm", "learning_rate", "seconds", "finished_at"],
    select(
        R.c.run_id,
        R.c.step + 1,
        bindparam("seq", type_=schema.steps.c.seq_id.type),
        R.c.pending_loss,
        R.c.pending_tokens,
        bindparam("grad_norm", type_=schema.steps.c.grad_norm.type),
        bindparam("learning_rate", type_=schema.steps.c.learning_rate.type),
        R.c.pending_seconds + bindparam("seconds", type_=schema.steps.c.seconds.type),
        bindparam("at", type_=schema.steps.c.finished_at.type),
    ).where(R.c.run_id == bindparam("key")),
)

_STEPPED = bindparam("stepped", type_=R.c.step.type)
"""1 when the operation was a step, which uses up what is pending; else 0."""

_ADVANCE_RUN = (
    update(R)
    .where(R.c.run_id == bindparam("key"))
    .values(
        step=R.c.step + _STEPPED,
        pending_loss=case((_STEPPED == 1, 0.0), else_=R.c.pending_loss + bindparam("loss")),
        pending_tokens=case((_STEPPED == 1, 0), else_=R.c.pending_tokens + bindparam("tokens")),
        pending_seconds=case((_STEPPED == 1, 0.0), else_=R.c.pending_seconds + bindparam("seconds")),
        next_seq=case((R.c.next_seq > bindparam("seq"), R.c.next_seq), else_=bindparam("seq") + literal(1)),
        status=case((R.c.status == RunStatus.CREATING, bindparam("created_as")), else_=R.c.status),
        last_request_at=bindparam("at"),
    )
)


def settle_futures(connection: Connection, outcomes: list[Outcome]) -> list[Settled | None]:
    """Store several outcomes; None for each that is not its sender's to settle any more."""
    at = now()
    answers: list[Settled | None] = []
    for part in _one_of_each_run(outcomes):
        if connection.dialect.name != "sqlite" and one_statement_settles(part):
            answers += _settle_at_once(connection, part, at)
        else:
            answers += _settle(connection, part, at)
    return answers


def settle_again(connection: Connection, outcomes: list[Outcome]) -> list[Settled | None]:
    """The same when nobody knows whether that was committed: what is stored already, word by word and in the epoch that
    only its sender had, was."""
    answers = settle_futures(connection, outcomes)
    unknown = {
        outcome.future.request_id: outcome
        for outcome, answer in zip(outcomes, answers, strict=True)
        if answer is None
    }
    if not unknown:
        return answers
    found = connection.execute(select(F).where(F.c.request_id.in_(list(unknown))))
    stored = {row.request_id: row for row in found if _is_stored(unknown[row.request_id], row)}
    return [
        _as_stored(outcome, stored[outcome.future.request_id])
        if answer is None and outcome.future.request_id in stored
        else answer
        for outcome, answer in zip(outcomes, answers, strict=True)
    ]


def _is_stored(outcome: Outcome, row: Row[Any]) -> bool:
    change = _future_change(outcome)
    names = ("status", "epoch", "error", "error_category", "error_id", "result_digest")
    ours = (
        row.finished_at is not None and row.engine == outcome.future.engine
    )  # each engine has epochs of its own
    return ours and all(getattr(row, name) == change[name] for name in names)


def _as_stored(outcome: Outcome, row: Row[Any]) -> Settled:
    """Folders that became useless are found by the sweeping of stray ones."""
    return Settled(_finished(outcome, row.finished_at), outcome.result)


def _one_of_each_run(outcomes: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    """The outcomes in their order, in parts that can be stored together: what a step records of its run is what the
    passes before it have added up."""
    part: dict[str, Outcome] = {}
    for outcome in outcomes:
        if (log := _log_of(outcome)) in part:
            yield list(part.values())
            part = {}
        part[log] = outcome
    yield list(part.values())


def one_statement_settles(outcomes: Sequence[Outcome]) -> bool:
    """Whether PostgreSQL may settle them all in one: none saves anything, and no two are of one run."""
    saves = any(outcome.checkpoint is not None or outcome.sampler is not None for outcome in outcomes)
    return not saves and len({_log_of(outcome) for outcome in outcomes}) == len(outcomes)


def _log_of(outcome: Outcome) -> str:
    return outcome.future.run_id or outcome.future.request_id


def _settle_at_once(connection: Connection, outcomes: list[Outcome], at: float) -> list[Settled | None]:
    settled = at_once.settle(connection, [_whole(outcome) for outcome in outcomes], at, this_hour())
    return [
        Settled(_finished(outcome, at), outcome.result) if outcome.future.request_id in settled else None
        for outcome in outcomes
    ]


def _settle(connection: Connection, outcomes: list[Outcome], at: float) -> list[Settled | None]:
    answers: list[Settled | None] = []
    stored: list[Outcome] = []
    for outcome, settleable in zip(outcomes, _settleable(connection, outcomes), strict=True):
        if not settleable:
            answers.append(None)
            continue
        final, orphan = _store_saved(connection, outcome)
        stored.append(final)
        answers.append(Settled(_finished(final, at), final.result, orphan))
    if stored:
        _store_outcomes(connection, stored, at)
        _advance_runs(connection, stored, at)
    return answers


def _finished(outcome: Outcome, at: float) -> Future:
    return replace(
        outcome.future,
        status=FutureStatus.FAILED if outcome.failed else FutureStatus.DONE,
        error=outcome.error,
        error_category=outcome.error_category,
        error_id=outcome.error_id,
        finished_at=at,
    )


def _settleable(connection: Connection, outcomes: list[Outcome]) -> list[bool]:
    """Whether each future is open, in its turn, and neither claimed by a newer epoch than the one of its outcome nor of
    an engine whose lease was taken in one."""
    query = _OPEN if connection.dialect.name == "sqlite" else _OPEN_LOCKED
    found = connection.execute(query, {"keys": [outcome.future.request_id for outcome in outcomes]}).all()
    rows = {row.request_id: row for row in found}
    next_seqs: dict[str, int] = {row.run_id: row.next_seq for row in found if row.run_id is not None}
    answers = []
    for outcome in outcomes:
        row = rows.pop(outcome.future.request_id, None)
        ours = row is not None and _is_senders(outcome, row)
        answers.append(ours and _in_turn(connection, outcome.future, next_seqs))
    return answers


def _in_turn(connection: Connection, future: Future, next_seqs: dict[str, int]) -> bool:
    """Whether nothing before it in its log is open.

    An outcome behind one that could not be stored (the disk was full for a moment) would move the log past that one,
    which would be lost.
    """
    if future.run_id is None:
        return True
    first = next_seqs[future.run_id]
    if future.seq_id > first:  # numbers between them were rejected, or never came
        between = {"run": future.run_id, "first": first, "seq": future.seq_id}
        if connection.execute(_BEFORE, between).first() is not None:
            return False
    next_seqs[future.run_id] = max(first, future.seq_id + 1)
    return True


def _is_senders(outcome: Outcome, row: Any) -> bool:
    fence, newest_claim = _fence(outcome)
    is_open = row.status in (FutureStatus.QUEUED, FutureStatus.RUNNING)
    if row.engine != outcome.future.engine:
        return False
    if fence is not None and (row.newest or 0) > fence:
        return False
    return is_open and (row.epoch or 0) <= newest_claim


def _fence(outcome: Outcome) -> tuple[int | None, int]:
    """The newest epoch that the engine's lease may have (None: any), and that the future may have been claimed in."""
    fence = outcome.fence if outcome.fence is not None else outcome.future.epoch
    return fence, outcome.future.epoch or fence or 0


def _store_saved(connection: Connection, outcome: Outcome) -> tuple[Outcome, str | None]:
    """Register what a save has written, and the folder that nothing refers to any more, if there is one.

    A name or number that is taken makes the operation fail, as its owner was promised.
    """
    if outcome.failed:
        return outcome, None
    if outcome.checkpoint is not None:
        return _store_checkpoint(connection, outcome, outcome.checkpoint)
    if outcome.sampler is not None:
        return _store_sampler(connection, outcome, outcome.sampler)
    return outcome, None


def _store_sampler(connection: Connection, outcome: Outcome, sampler: Sampler) -> tuple[Outcome, str | None]:
    taken_by = insert_sampler(connection, sampler)
    if taken_by is None:
        return outcome, None
    number = sampler.sampler_id.rpartition(":")[2]
    message = (
        f"sampling_session_seq_id is {number}, under which this session has a sampler of {described(taken_by)} "
        "already; give another number"
    )
    return _refused(outcome, message), sampler.folder


def _store_checkpoint(
    connection: Connection, outcome: Outcome, checkpoint: Checkpoint
) -> tuple[Outcome, str | None]:
    inserted, replaced = insert_checkpoint(connection, checkpoint, overwrite=outcome.overwrite)
    if not inserted:
        message = (
            f"a checkpoint named {checkpoint.name!r} exists already in this run ({checkpoint.path}); "
            "choose another name or delete it first"
            + (", or pass overwrite=True" if checkpoint.has_optimizer else "")
        )
        return _refused(outcome, message), checkpoint.folder
    if replaced is not None and not folder_in_use(connection, replaced):
        return outcome, replaced
    return outcome, None


def _refused(outcome: Outcome, message: str) -> Outcome:
    return replace(outcome, result=None, error=message, error_category="user", sampler=None, checkpoint=None)


def _store_outcomes(connection: Connection, outcomes: list[Outcome], at: float) -> None:
    rows = [{f"to_{name}": value for name, value in _future_change(outcome).items()} for outcome in outcomes]
    connection.execute(
        _SETTLE_FUTURE,
        [
            {**row, "key": outcome.future.request_id, "at": at}
            for row, outcome in zip(rows, outcomes, strict=True)
        ],
    )
    bodies = [
        {"request_id": outcome.future.request_id, "body": outcome.result, "stored_at": at}
        for outcome in outcomes
        if outcome.result is not None
    ]
    if bodies:
        connection.execute(insert_or_ignore(connection, schema.results), bodies)
    if spent := [outcome.future.request_id for outcome in outcomes if _is_spent(outcome)]:
        connection.execute(_DELETE_INPUTS, {"keys": spent})
    count_outcomes(connection, (outcome.usage for outcome in outcomes if not outcome.failed))


def _future_change(outcome: Outcome) -> dict[str, Any]:
    """The columns of a future that an outcome sets."""
    return {
        "epoch": outcome.future.epoch,
        "started_at": outcome.future.started_at,
        "status": FutureStatus.FAILED if outcome.failed else FutureStatus.DONE,
        "error": outcome.error,
        "error_category": outcome.error_category,
        "error_id": outcome.error_id,
        "result_digest": None if outcome.failed else outcome.digest,
        "measure": outcome.summary.get("loss", outcome.summary.get("grad_norm")),
    }


def _is_spent(outcome: Outcome) -> bool:
    """Whether no replay applies it again."""
    return outcome.failed or outcome.future.kind not in CHANGES_STATE


def _advance_runs(connection: Connection, outcomes: list[Outcome], at: float) -> None:
    """Move each run past its operation, and keep the sums that become the metrics of its next step."""
    ran = [outcome for outcome in outcomes if outcome.future.run_id is not None]
    steps = [_step(outcome, at) for outcome in ran if _succeeded(outcome, "optim_step")]
    if steps:
        connection.execute(_RECORD_STEP, steps)
    if ran:
        connection.execute(_ADVANCE_RUN, [_advance(outcome, at) for outcome in ran])


def _succeeded(outcome: Outcome, kind: str) -> bool:
    return outcome.future.kind == kind and not outcome.failed


def _step(outcome: Outcome, at: float) -> dict[str, Any]:
    return {
        "key": outcome.future.run_id,
        "seq": outcome.future.seq_id,
        "seconds": outcome.summary.get("seconds", 0.0),
        "grad_norm": outcome.summary.get("grad_norm"),
        "learning_rate": outcome.summary.get("learning_rate"),
        "at": at,
    }


def _advance(outcome: Outcome, at: float) -> dict[str, Any]:
    return {
        "key": outcome.future.run_id,
        "seq": outcome.future.seq_id,
        "stepped": int(_succeeded(outcome, "optim_step")),
        "at": at,
        **_run_change(outcome),
    }


def _run_change(outcome: Outcome) -> dict[str, Any]:
    """What an outcome makes of a run that was being created, and what it adds to the sums of its next step."""
    uncreated = outcome.failed and outcome.future.kind == "create_run"
    summary = outcome.summary if _succeeded(outcome, "forward_backward") else {}
    return {
        "created_as": RunStatus.FAILED if uncreated else RunStatus.ACTIVE,
        "loss": summary.get("loss", 0.0),
        "tokens": int(summary.get("tokens", 0)),
        "seconds": summary.get("seconds", 0.0),
    }


def _whole(outcome: Outcome) -> dict[str, Any]:
    """All that one statement stores of an outcome."""
    future = outcome.future
    stepped = _succeeded(outcome, "optim_step")
    fence, newest_claim = _fence(outcome)
    row = {
        "request_id": future.request_id,
        "run_id": future.run_id,
        "seq_id": future.seq_id,
        "engine": future.engine,
        "fence": fence,
        "newest_claim": newest_claim,
        "body": outcome.result,
        "spent": _is_spent(outcome),
        "stepped": stepped,
        **_future_change(outcome),
        **_run_change(outcome),
    }
    if stepped:
        numbers = ("grad_norm", "learning_rate")
        row |= {"seconds": outcome.summary.get("seconds", 0.0)} | {n: outcome.summary.get(n) for n in numbers}
    if outcome.usage is not None and not outcome.failed:
        row |= counted(outcome.usage)
    return row
