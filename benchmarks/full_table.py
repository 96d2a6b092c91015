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

import httpx
from sqlalchemy import delete, func, select

from benchmarks.filling import fill
from benchmarks.measuring import KEY, RESULTS, gateway, keep, median
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


async def stored(url: str, *, duties_anew: bool = False) -> int:
    """Calls in a database. `duties_anew`: forget that duties were performed, so that the next gateway does."""
    database = Database(url)
    try:
        if duties_anew:
            await database.alone(lambda connection: connection.execute(delete(schema.duties)))
        [(count,)] = await database.rows(select(func.count()).select_from(schema.futures))
        return int(count)
    finally:
        await database.close()


def duties(url: str) -> dict[str, Any]:
    """Those that delete calls and results, as the admin API shows them."""
    answer = httpx.get(f"{url}/admin/v1/duties", headers={"X-API-Key": KEY}, timeout=30, trust_env=False)
    return {duty["name"]: duty for duty in answer.json() if duty["name"] in ("old calls", "old results")}


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
    """Rows deleted a second, and futures a second of a client meanwhile and afterwards."""
    before = asyncio.run(stored(full, duties_anew=True))
    with gateway(folder / "full", ENGINE, full, duty_s="1e6") as served:
        began = time.perf_counter()
        during: list[dict[str, float]] = []
        while not during or (len(during) < repeats and not _over(served.url)):
            during.append(client_process("futures", served.url, 1, count))
        seconds = time.perf_counter() - began
        over = _over(served.url)
        removed = before + sum(count + 1 for _ in during) - asyncio.run(stored(full))
        deadline = time.monotonic() + 900
        while not _over(served.url) and time.monotonic() < deadline:
            time.sleep(1)
        found = duties(served.url)
        after = [client_process("futures", served.url, 1, count) for _ in during]
    ratio = median([run["per_second"] for run in during]) / median([run["per_second"] for run in after])
    rates = {name: duty["last_done"] / max(duty["last_seconds"], 1e-9) for name, duty in found.items()}
    return {
        "calls_before": before,
        "calls_removed_meanwhile": removed,
        "seconds": seconds,
        "ended_meanwhile": over,
        "rows_per_second": rates,
        "during_per_second": [run["per_second"] for run in during],
        "after_per_second": [run["per_second"] for run in after],
        "during_p50_ms": [run["p50_ms"] for run in during],
        "after_p50_ms": [run["p50_ms"] for run in after],
        "speed_meanwhile": ratio,
    }


def _over(url: str) -> bool:
    found = duties(url)
    return len(found) == 2 and all(duty["runs"] for duty in found.values())


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
    results = {kind: measure(kind, futures, repeats, count) for kind in args.stores.split(",")}
    keep("full_table", {"stores": results}, args.out)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
