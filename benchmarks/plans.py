"""How the database finds the rows of each statement of the hot paths: none may read a whole table.

The statements are not written down here: they are what the store sends while it does each of these things once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, event

from gateway.store import Store
from gateway.store.futures import Claim, Submission
from gateway.store.records import Future, Outcome, Run, Sampler, Session
from gateway.store.retention import Batch

LARGE = ("futures", "inputs", "results")
"""Tables that hold a row for each call."""


@dataclass(frozen=True)
class Plan:
    """One statement of an action, and each table that its plan reads from one end to the other."""

    action: str
    statement: str
    lines: list[str]
    whole_tables: list[str]


async def plans(store: Store) -> list[Plan]:
    """The plans of every hot path on a store that `benchmarks.filling.fill` has filled."""
    found: list[Plan] = []
    for action, work in _actions(store).items():
        with listening(store) as sent:
            await work()
        for statement, parameters in sent:
            if not statement.startswith(("INSERT", "BEGIN", "PRAGMA")):
                found.append(await _explained(store, action, statement, parameters))
    return found


def _actions(store: Store) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Everything that a call goes through, and what looks at or removes many of them."""
    now = time.time()
    session = Session("s-new", "owner0", None, {}, [], "0.38.0", None, None, now, now)
    run = Run(
        "s-new:train:0", "owner0", "s-new", 0, "fake", "fake/model", {}, "adamw", None, None, {}, now, now
    )  # fmt: skip
    sampler = Sampler("s1:sample:0", "owner1", "s1", "fake", "fake/model", None, None, None, now - 40 * 86400)
    create = _future(run.run_id, "create_run", 0, run_id=run.run_id)
    step = _future(run.run_id, "optim_step", 1, run_id=run.run_id)
    sample = _future(sampler.sampler_id, "sample", 10**6, sampler_id=sampler.sampler_id)
    futures, retention = store.futures, store.retention

    async def submit() -> None:
        await store.sessions.create(session)
        await futures.submit(Submission(create, b"x", run))
        for each in (step, sample):
            await futures.submit(Submission(each, b"x"))

    async def perform() -> None:
        for each in (create, step, sample):
            await futures.claim(Claim((each.request_id,), 1))
            await futures.settle(Outcome(replace(each, epoch=1), result=b"x"))

    ids = tuple(each.request_id for each in (create, step, sample))
    return {
        "submit": submit,
        "reload": lambda: futures.open_of_engine("fake"),
        "count open": futures.counts,
        "open elsewhere": lambda: futures.open_ids("fake", now - 60),
        "queues elsewhere": lambda: futures.queues("fake"),
        "settled elsewhere": lambda: futures.settled_of(ids),
        "count deaths": lambda: futures.count_deaths(ids),
        "claim and settle": perform,
        "retrieve": lambda: futures.get(step.request_id),
        "retrieve result": lambda: futures.result(step.request_id),
        "open a run": lambda: futures.of_run_from("s0:train:0", 990),
        "next number": lambda: futures.next_number("s0:train:0"),
        "replay": lambda: futures.applied_to_run("s0:train:0", 0, 2000, ("optim_step",), 32),
        "inputs": lambda: futures.inputs(ids),
        "list of an owner": lambda: futures.page(limit=100, where={"owner": "owner1"}),
        "list of all": lambda: futures.page(limit=100, before=(now - 86400, "s")),
        "list of a run": lambda: futures.page(limit=100, where={"run_id": "s0:train:0"}),
        "finished samples": lambda: futures.finished_of_sampler(sampler, range(10**9), since=0.0, limit=1000),
        "timeline": lambda: futures.of_session(session, 1000),
        "prune results": lambda: retention.delete_results(Batch(now - 39 * 86400, 100)),
        "prune calls": lambda: retention.delete_futures(Batch(now - 39 * 86400, 100)),
        "prune dead logs": lambda: retention.delete_dead_logs(Batch(now - 10 * 86400, 100)),
        "end sessions": lambda: retention.end_silent_sessions(Batch(now - 86400, 100)),
        "release samplers": lambda: retention.release_samplers(Batch(now - 30 * 86400, 100)),
    }


def _future(log_id: str, kind: str, seq_id: int, **whose: str) -> Future:
    owner = "owner1" if kind == "sample" else "owner0"
    return Future(f"{log_id}:{seq_id}", owner, "fake", kind, seq_id, time.time(), **whose)  # type: ignore[arg-type]


@contextmanager
def listening(store: Store) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are sent meanwhile, each with the parameters of its first execution."""
    sent: list[tuple[str, Any]] = []

    def heard(_c: object, _r: object, statement: str, parameters: Any, _x: object, many: bool) -> None:
        sent.append((statement.strip(), parameters[0] if many else parameters))

    engines = store.database.engines()
    for engine in engines:
        event.listen(engine, "before_cursor_execute", heard)
    try:
        yield sent
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", heard)


async def _explained(store: Store, action: str, statement: str, parameters: Any) -> Plan:
    def work(connection: Connection) -> Plan:
        if connection.dialect.name == "sqlite":
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            lines = [str(row[3]) for row in rows]
            return Plan(action, statement, lines, _scanned_by_sqlite(lines))
        answer = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one()
        nodes = nodes_of(answer)
        lines = [" ".join(str(node[key]) for key in _SHOWN if key in node) for node in nodes]
        return Plan(action, statement, lines, scanned_by_postgres(nodes))

    return await store.database.read(work)


_SHOWN = ("Node Type", "Relation Name", "Index Name", "Index Cond", "Filter")


def _scanned_by_sqlite(lines: list[str]) -> list[str]:
    """`SCAN t USING INDEX` walks an index in its order, which is no search unless a limit ends it."""
    scans = [line.split() for line in lines if line.startswith("SCAN")]
    return [words[1] for words in scans if words[1] in LARGE and "USING" not in words]


def nodes_of(answer: Any) -> list[dict[str, Any]]:
    """The nodes of a plan that PostgreSQL has explained as JSON."""
    return list(_nodes((json.loads(answer) if isinstance(answer, str) else answer)[0]["Plan"]))


def scanned_by_postgres(nodes: list[dict[str, Any]]) -> list[str]:
    """The large tables that a plan reads from one end to the other."""
    scans = [node for node in nodes if node["Node Type"] == "Seq Scan"]
    return [node["Relation Name"] for node in scans if node["Relation Name"] in LARGE]


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
