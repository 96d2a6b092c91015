"""The duties of the gateways: which one performs each, when it was done last, and how that went.

Times are those of whoever writes; the clocks of several gateways should agree within a lease. A lease that two believe
to hold costs work and nothing else: a duty may be performed by two at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from gateway.store import schema
from gateway.store.database import Database
from gateway.store.dialect import for_update, insert_or_ignore, now
from gateway.store.records import DutyRecord

D = schema.duties

_LONGEST_ERROR = 300


@dataclass(frozen=True, slots=True)
class DutyLease:
    """`holder` wants to perform the duty `name`, if it was not performed in the last `every_s` seconds, and to be alone
    with that for `seconds`."""

    name: str
    holder: str
    every_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DutyReport:
    """How a duty went that began `took_s` seconds ago: how many things were `done`, or the `error` that ended it."""

    lease: DutyLease
    took_s: float
    done: int = 0
    error: str | None = None


class DutyStore:
    """One row a duty."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, lease: DutyLease) -> float:
        """Seconds after which to ask again, because another one performs it or it was performed not long ago; 0: it is
        this holder's now."""
        return await self._database.write(_take, lease)

    async def renew(self, lease: DutyLease) -> bool:
        """Whether the lease is still this holder's; if so it begins anew."""
        return await self._database.write(_renew, lease)

    async def report(self, report: DutyReport) -> None:
        """Write down how it went, and give the lease back."""
        await self._database.write(_report, report)

    async def give_back(self, lease: DutyLease) -> None:
        """Leave a duty to others without having finished it."""
        await self._database.write(_give_back, lease)

    async def all(self) -> list[DutyRecord]:
        """Every duty that was ever performed, by name."""
        rows = await self._database.rows(select(D).order_by(D.c.name))
        return [DutyRecord(**row._mapping) for row in rows]


def _take(connection: Connection, leases: list[DutyLease]) -> list[float]:
    answers = []
    for lease in leases:
        fresh = {"name": lease.name, "expires_at": 0.0, "runs": 0, "failures": 0, "done": 0}
        connection.execute(insert_or_ignore(connection, D), fresh)
        row = connection.execute(for_update(connection, select(D).where(D.c.name == lease.name))).one()
        wait = _wait(DutyRecord(**row._mapping), lease, now())
        if wait <= 0:
            change = {"holder": lease.holder, "expires_at": now() + lease.seconds}
            connection.execute(update(D).where(D.c.name == lease.name).values(change))
        answers.append(wait)
    return answers


def _wait(duty: DutyRecord, lease: DutyLease, at: float) -> float:
    """Never longer than the interval or the lease: a clock that was set back must not stop a duty."""
    held = min(duty.expires_at - at, lease.seconds) if duty.holder not in (None, lease.holder) else 0.0
    since = at - duty.last_run_at if duty.last_run_at is not None else lease.every_s
    due = lease.every_s - since if 0 <= since < lease.every_s else 0.0
    return max(held, due, 0.0)


def _renew(connection: Connection, leases: list[DutyLease]) -> list[bool]:
    renewed = []
    for lease in leases:
        change = update(D).where(_mine(lease)).values(expires_at=now() + lease.seconds).returning(D.c.name)
        renewed.append(connection.execute(change).first() is not None)
    return renewed


def _report(connection: Connection, reports: list[DutyReport]) -> list[None]:
    for report in reports:
        at = now()
        values: dict[str, Any] = {
            "holder": None,
            "expires_at": 0.0,
            "last_run_at": at,
            "last_seconds": report.took_s,
            "last_done": report.done,
            "runs": D.c.runs + 1,
            "done": D.c.done + report.done,
        }
        if report.error is not None:
            error = {"last_error": report.error[:_LONGEST_ERROR], "failed_at": at}
            values |= {"failures": D.c.failures + 1, **error}
        connection.execute(update(D).where(_mine(report.lease)).values(values))
    return [None] * len(reports)


def _give_back(connection: Connection, leases: list[DutyLease]) -> list[None]:
    for lease in leases:
        connection.execute(update(D).where(_mine(lease)).values(holder=None, expires_at=0.0))
    return [None] * len(leases)


def _mine(lease: DutyLease) -> ColumnElement[bool]:
    return (D.c.name == lease.name) & (D.c.holder == lease.holder)
