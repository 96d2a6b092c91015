"""Checkpoints that no operation of their run has saved: copies, imports, samplers that were given a name.

The rows that one needs (a session, a run to hold it, the checkpoint) appear in one transaction, or none does.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from gateway.errors import BadRequest, NotFound
from gateway.store import schema
from gateway.store.checkpoints import (
    checkpoint_of,
    folder_in_use,
    insert_checkpoint,
    record_read,
    require_checkpoints,
)
from gateway.store.database import Database
from gateway.store.records import Checkpoint, Reference, Run, RunStatus, Session
from gateway.store.runs import insert_runs, run_of
from gateway.store.sessions import insert_sessions

R = schema.runs
C = schema.checkpoints


@dataclass(frozen=True, slots=True)
class Deposit:
    """A checkpoint to register. `run` is made to hold it, in `session` if that is new too; `needs` is the checkpoint
    whose files it shares.

    A session with an idempotency key, or a run that is there already, means that the same request was answered before.
    """

    checkpoint: Checkpoint
    run: Run | None = None
    session: Session | None = None
    needs: Reference | None = None


@dataclass(frozen=True, slots=True)
class Deposited:
    """What is stored: the checkpoint, or the one that a first try has stored. `orphaned_folder` is of an expired one
    whose name it has taken."""

    checkpoint: Checkpoint
    orphaned_folder: str | None = None


class DepositStore:
    """Registers checkpoints that are not the outcome of a save."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, deposit: Deposit) -> Deposited:
        """Raises BadRequest when a name is taken, and NotFound when what is to be shared has gone."""
        return await self._database.write(deposit_checkpoints, deposit)


def deposit_checkpoints(connection: Connection, deposits: list[Deposit]) -> list[Deposited]:
    return [_deposit(connection, deposit) for deposit in deposits]


def _deposit(connection: Connection, deposit: Deposit) -> Deposited:
    earlier = _earlier_run(connection, deposit)
    if earlier is not None:
        return Deposited(_same_again(connection, deposit, earlier))
    if deposit.needs is not None:
        require_checkpoints(connection, [deposit.needs])
        record_read(connection, deposit.checkpoint.owner, deposit.needs, "copy")
    inserted, replaced = insert_checkpoint(connection, deposit.checkpoint, overwrite=False)
    if not inserted:
        raise BadRequest(
            f"a checkpoint named {deposit.checkpoint.name!r} exists already in this run ({deposit.checkpoint.path}); "
            "choose another name or delete it first",
            param="name",
        )
    free = replaced is not None and not folder_in_use(connection, replaced)
    return Deposited(deposit.checkpoint, replaced if free else None)


def _earlier_run(connection: Connection, deposit: Deposit) -> Run | None:
    """Store session and run; the run that was there before them, if one was."""
    run = deposit.run
    if run is None:
        return None
    if deposit.session is not None:
        [stored] = insert_sessions(connection, [deposit.session])
        if stored.session_id != deposit.session.session_id:
            return run_of(connection.execute(select(R).where(R.c.session_id == stored.session_id)).one())
    present = connection.execute(select(R).where(R.c.run_id == run.run_id)).first()
    if present is not None:
        return run_of(present)
    insert_runs(connection, [run])
    return None


def _same_again(connection: Connection, deposit: Deposit, earlier: Run) -> Checkpoint:
    wanted = deposit.run
    assert wanted is not None
    if earlier.status is not RunStatus.STORAGE or earlier.origin_path != wanted.origin_path:
        raise BadRequest(
            f"run {earlier.run_id} was made by another request; use another idempotency key or model_seq_id",
            param="model_seq_id",
        )
    row = connection.execute(select(C).where(C.c.run_id == earlier.run_id)).first()
    if row is None:
        raise NotFound(
            f"the copy of {wanted.origin_path} in run {earlier.run_id} has been deleted since it was made"
        )
    return checkpoint_of(row)
