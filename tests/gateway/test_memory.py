"""What a gateway process holds in memory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from gateway.migrate import upgrade
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.futures import Submission
from gateway.store.records import FutureStatus
from tests.gateway.conftest import KEY, begin_run, outcome, send_pass
from tests.served import ServedGateway
from tests.store.conftest import a_run, a_session, an_operation

MEGABYTE = 1e6


async def fill(database_file: Path, done: int, waiting: int) -> None:
    """Futures of one run: some are done, and some wait behind a number that never comes."""
    store = Store(Database(f"sqlite:///{database_file}"))
    await upgrade(store.database)
    store.start()
    session = await store.sessions.create(a_session(owner="local"))
    run = a_run(session, engine="fake", base_model="fake/model", next_seq=done)
    writes = [store.futures.submit(Submission(an_operation(run, 0, "create_run"), b"x", run))]
    for seq_id in range(1, done):
        future = replace(an_operation(run, seq_id), status=FutureStatus.DONE)
        writes.append(store.futures.submit(Submission(future, b"x" * 1000)))
    for seq_id in range(done + 1, done + 1 + waiting):
        writes.append(store.futures.submit(Submission(an_operation(run, seq_id), b"x" * 1000)))
    await asyncio.gather(*writes)
    await store.close()


@pytest.mark.slow
def test_ten_thousand_stored_futures_fit_into_250_megabytes(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "data")
    gateway.data_dir.mkdir()
    asyncio.run(fill(gateway.data_dir / "tandem.db", 5_000, 5_000))
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            run_id = begin_run(http)
            assert "metrics" in outcome(http, send_pass(http, run_id, 1, [1, 2, 3]).json()["request_id"])
            listed = http.get("/admin/v1/futures", params={"limit": 1000}).json()
            assert len(listed["items"]) == 1000
            open_futures = http.get("/admin/v1/metrics").json()["open_futures"]["fake"]
            assert open_futures["queued"] >= 5_000
        pages = int(Path(f"/proc/{gateway.pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 250 * MEGABYTE
    finally:
        gateway.close()


def test_the_gateway_imports_no_framework() -> None:
    probe = "import sys, gateway.app; print([m for m in ('torch', 'transformers', 'peft', 'vllm') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True, timeout=60
    )
    assert output.stdout.strip() == "[]"
