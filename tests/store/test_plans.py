"""No statement of a hot path reads a whole table of calls, on either database."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from benchmarks.filling import PER_LOG, fill
from benchmarks.plans import LARGE, Plan, plans
from gateway.store import Store, schema

FUTURES = 10_000
ACTIONS = {
    "submit", "claim and settle", "reload", "count open", "count deaths", "open elsewhere", "queues elsewhere",
    "settled elsewhere", "retrieve", "retrieve result", "open a run", "next number", "replay", "inputs",
    "list of an owner", "list of all", "list of a run", "finished samples", "timeline", "prune results", "prune calls",
    "prune dead logs", "end sessions", "release samplers",
}  # fmt: skip


@pytest.fixture
async def found(store: Store) -> list[Plan]:
    await fill(store.database, FUTURES)
    return await plans(store)


async def test_every_hot_statement_finds_its_rows_by_an_index(found: list[Plan]) -> None:
    """`submit` only inserts."""
    assert {plan.action for plan in found} >= ACTIONS - {"submit"}
    told = [
        f"{plan.action}: {plan.statement}\n  " + "\n  ".join(plan.lines)
        for plan in found
        if plan.whole_tables
    ]
    assert not told, "\n".join(told)


async def test_a_statement_without_an_index_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(store.database, FUTURES)
    scanning = {"scan": lambda: store.futures.page(limit=1, where={"error_id": "x", "kind": "y"})}
    drop = "DROP INDEX ix_futures_created_at"
    await store.database.alone(lambda connection: connection.exec_driver_sql(drop))
    monkeypatch.setattr("benchmarks.plans._actions", lambda store: scanning)
    assert [plan.whole_tables for plan in await plans(store)] == [["futures"]]


async def test_the_table_is_filled_as_it_says(store: Store) -> None:
    await fill(store.database, FUTURES)
    for table in LARGE:
        [(count,)] = await store.database.rows(
            select(func.count()).select_from(schema.metadata.tables[table])
        )
        assert count == FUTURES or (table == "inputs" and 0 < count < FUTURES / 2)
    log = await store.futures.of_run_from("s0:train:0", 0)
    assert [future.seq_id for future in log] == list(range(PER_LOG))
    assert {"create_run", "forward_backward", "optim_step", "save_weights"} == {each.kind for each in log}
