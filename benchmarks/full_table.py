"""A database with a million stored calls against an empty one: a future's round trip, and deleting what is over.

    python -m benchmarks.full_table [--futures 1000000] [--stores sqlite,postgres] [--smoke]

Both databases are served at the same time, and the same client measures them in turn. Then the full one is served with
the default retention, which deletes what is older than 30 days, while the client goes on. Postgres is a server of this
command's own, whose commits reach the disk. The plans of all statements are printed; one that reads a whole table is
an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select

from benchmarks.filling import fill
from benchmarks.measuring import RESULTS, gateway, keep, median
from benchmarks.plans import plans
from benchmarks.roundtrip import ENGINE, client_process
from gateway.migrate import upgrade
from gateway.store import Store, schema
from gateway.store.database import Database
from tests.postgres import PostgresServer

EVERYTHING_STAYS = {"result_retention_s": "1e9", "future_retention_s": "1e9", "unnamed_retention_s": "1e9"}


@contextmanager
def places(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """URLs of two databases, neither of which exists yet as far as the gateway is concerned."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'full' / 'tandem.db'}", f"sqlite:///{folder / 'empty' / 'tandem.db'}"
        return
    server = PostgresServer(durable=True)
    try:
        yield server.url(server.create_database()), server.url(server.create_database())
    finally:
        server.close()


async def filled(url: str, futures: int) -> tuple[float, list[str]]:
    """Fill a database; the seconds that took, and a line for each step of each plan."""
    database = Database(url, sqlite_synchronous="NORMAL")
    store = Store(database)
    try:
        await upgrade(database)
        began = time.perf_counter()
        await fill(database, futures)
        seconds = time.perf_counter() - began
        store.start()
        found = await plans(store)
    finally:
        await store.close()
    whole = [f"{plan.action}: {plan.statement}" for plan in found if plan.whole_tables]
    if whole:
        raise RuntimeError("these read a whole table:\n" + "\n".join(whole))
    return seconds, [f"{plan.action}: {line}" for plan in found for line in plan.lines]


async def stored(url: str, *, duties_anew: bool = False) -> dict[str, int]:
    """Calls and results in a database. `duties_anew`: forget that duties were performed, so that the next gateway
    performs them at once."""
    database = Database(url)
    try:
        if duties_anew:
            await database.alone(lambda connection: connection.execute(delete(schema.duties)))
        counts = {}
        for name, table in (("calls", schema.futures), ("results", schema.results)):
            [(counts[name],)] = await database.rows(select(func.count()).select_from(table))
        return counts
    finally:
        await database.close()


def round_trips(folder: Path, full: str, empty: str, repeats: int, count: int) -> dict[str, Any]:
    """Medians of a lone client, the two databases in turn."""
    measured: dict[str, list[float]] = {"full": [], "empty": []}
    with ExitStack() as stack:
        served = {
            name: stack.enter_context(gateway(folder / name, ENGINE, url, **EVERYTHING_STAYS))
            for name, url in (("full", full), ("empty", empty))
        }
        for each in served.values():
            client_process("futures", each.url, 1, count // 4)  # warm-up
        for _ in range(repeats):
            for name, each in served.items():
                measured[name].append(client_process("futures", each.url, 1, count)["p50_ms"])
    ratios = [a / b for a, b in zip(measured["full"], measured["empty"], strict=True)]
    return {**measured, "ratios": ratios, "ratio": median(ratios)}


def pruning(folder: Path, full: str, repeats: int, count: int) -> dict[str, Any]:
    """Rows deleted a second while a client goes on, and its futures a second with that and without, in turn."""
    speeds: dict[str, list[float]] = {"during": [], "without": []}
    rates: dict[str, list[float]] = {"calls": [], "results": []}
    for _ in range(repeats):
        before = asyncio.run(stored(full, duties_anew=True))
        began = time.perf_counter()
        with gateway(folder / "full", ENGINE, full) as served:
            speeds["during"].append(client_process("futures", served.url, 1, count)["per_second"])
        seconds = time.perf_counter() - began
        after = asyncio.run(stored(full))
        for name, rows in rates.items():
            rows.append((before[name] + count + 1 - after[name]) / seconds)
        with gateway(folder / "full", ENGINE, full, **EVERYTHING_STAYS) as served:
            speeds["without"].append(client_process("futures", served.url, 1, count)["per_second"])
    ratios = [a / b for a, b in zip(speeds["during"], speeds["without"], strict=True)]
    return {**speeds, "ratios": ratios, "ratio": median(ratios), "rows_per_second": rates}


def measure(kind: str, futures: int, repeats: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, places(kind, Path(name)) as (full, empty):
        for each in ("full", "empty"):
            (Path(name) / each).mkdir()
        seconds, lines = asyncio.run(filled(full, futures))
        print("\n".join(lines), flush=True)
        print(f"{kind}: filled with {futures} calls in {seconds:.0f} s", flush=True)
        trips = round_trips(Path(name), full, empty, repeats, count)
        print(json.dumps(trips), flush=True)
        return {"futures": futures, "round_trip": trips, "pruning": pruning(Path(name), full, repeats, count)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--futures", type=int, default=1_000_000)
    parser.add_argument("--stores", default="sqlite,postgres")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    futures, repeats, count = (10_000, 1, 10) if args.smoke else (args.futures, args.repeats, 400)
    results: dict[str, Any] = {}
    for kind in args.stores.split(","):
        results[kind] = measure(kind, futures, repeats, count)
        keep("full-table", {"stores": results}, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
