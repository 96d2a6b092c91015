"""An engine's lease is renewed from its taking on, and its process does not outlive what can be renewed."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.app import running_gateway
from gateway.engine_settings import EngineSettings
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.store.leases import LeaseRequest, LeaseStore
from gateway.supervisor import EngineState, Supervisor
from tests.postgres import PostgresServer
from tests.served import ServedGateway

THIEF = LeaseRequest("slow", "another gateway", 60.0)


class Slow:
    """A gateway whose engine takes `load_s` to load; the process that loads writes its number down."""

    def __init__(self, folder: Path, load_s: float, lease_s: float) -> None:
        self.pid_file = folder / "pid"
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\necho $$ > {self.pid_file}\nsleep {load_s}\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        engine = EngineSettings(name="slow", base_model="fake/model", plugin="fake", python=str(python))
        self.settings = Settings(data_dir=folder / "data", engines=(engine,), lease_s=lease_s)

    def started(self) -> bool:
        return self.pid_file.exists() and bool(self.pid_file.read_text().strip())

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())


def supervisor_of(gateway: Gateway) -> Supervisor:
    [dispatcher] = gateway.fleet.dispatchers.values()
    return dispatcher.supervisor


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


async def until(condition: Callable[[], bool], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.02)


async def test_nobody_can_take_it_while_the_model_is_loaded(tmp_path: Path) -> None:
    """Loading takes twice as long as a lease."""
    slow = Slow(tmp_path, load_s=5, lease_s=2.5)
    async with running_gateway(slow.settings) as gateway:
        supervisor = supervisor_of(gateway)
        await until(slow.started, 10)
        asked = 0
        while supervisor.state is EngineState.STARTING:
            assert await gateway.store.leases.take(THIEF) is None
            asked += 1
            await asyncio.sleep(0.1)
        assert asked > 10
        assert (supervisor.state, supervisor.starts, supervisor.epoch) == (EngineState.READY, 1, 1)


async def test_a_process_that_loads_ends_when_another_gateway_has_its_lease(tmp_path: Path) -> None:
    slow = Slow(tmp_path, load_s=60, lease_s=1.5)
    async with running_gateway(slow.settings) as gateway:
        supervisor = supervisor_of(gateway)
        await until(slow.started, 10)
        pid = slow.pid
        assert lives(pid)
        mine = LeaseRequest("slow", gateway.fleet.holder, 1.5)
        async with asyncio.timeout(10):
            stolen = None
            while stolen is None:  # a renewal may come in between
                await gateway.store.leases.give_back(mine)
                stolen = await gateway.store.leases.take(THIEF)
        await until(lambda: supervisor.state is EngineState.WAITING, 10)
        assert not lives(pid)
        assert supervisor.process is None
        assert not supervisor.holding


@pytest.mark.postgres
async def test_who_is_refused_when_it_tells_others_of_its_engine_ends_it(
    tmp_path: Path, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next renewal in turn would come 20 s later."""
    renew = LeaseStore.renew
    refused = 0

    async def refusing(self: LeaseStore, request: LeaseRequest) -> bool:
        nonlocal refused
        if request.state == EngineState.READY and not refused:
            refused += 1
            return False
        return await renew(self, request)

    monkeypatch.setattr(LeaseStore, "renew", refusing)
    engine = EngineSettings(name="fake", base_model="fake/model", plugin="fake")
    settings = Settings(data_dir=tmp_path / "data", engines=(engine,), lease_s=60, database_url=pg_url)
    async with running_gateway(settings) as gateway:
        supervisor = supervisor_of(gateway)
        await until(lambda: supervisor.starts == 2 and supervisor.state is EngineState.READY, 15)
        assert refused == 1
        assert supervisor.epoch == 2


# ---------------------------------------------------------------------------- the database is away


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of this test's own, to be stopped and started."""
    own = PostgresServer()
    yield own
    own.close()


@asynccontextmanager
async def on(server: PostgresServer, folder: Path, lease_s: float) -> AsyncIterator[Gateway]:
    """A gateway of that server, whose engine is ready."""
    url = server.url(server.create_database())
    (folder / "migrating").mkdir()
    await asyncio.to_thread(ServedGateway(folder / "migrating", None, database_url=url).migrate)
    engine = EngineSettings(name="fake", base_model="fake/model", plugin="fake")
    settings = Settings(
        data_dir=folder / "data",
        engines=(engine,),
        lease_s=lease_s,
        engine_owner_timeout_s=lease_s * 2 / 3,
        database_url=url,
    )
    async with running_gateway(settings) as gateway:
        await asyncio.wait_for(supervisor_of(gateway).ready(), 20)
        yield gateway


# What SQLAlchemy could not close, for it was cut, is left to the garbage collector.
cut = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@cut
@pytest.mark.postgres
async def test_an_engine_whose_lease_cannot_be_renewed_is_ended_before_it_is_over(
    tmp_path: Path, server: PostgresServer
) -> None:
    """And nobody is blamed for it; when the database is back, the lease is taken anew."""
    lease_s = 3.0
    async with on(server, tmp_path, lease_s) as gateway:
        supervisor = supervisor_of(gateway)
        process = supervisor.now()
        assert process.pid is not None
        await asyncio.to_thread(server.stop, signal.SIGINT)
        stopped_at = time.monotonic()
        try:
            await asyncio.wait_for(asyncio.shield(process.lost), 10)
            assert time.monotonic() - stopped_at < lease_s
            assert process.abandoned
            await until(lambda: process.pid is not None and not lives(process.pid), 5)
            await until(lambda: "lease could not be renewed" in (supervisor.problem or ""), 5)
            await asyncio.sleep(3)  # the pauses between attempts do not grow meanwhile
        finally:
            await asyncio.to_thread(server.start_again)
        await until(lambda: supervisor.state is EngineState.READY, 15)
        assert supervisor.epoch == 2
        assert supervisor._delay() <= 0.5
        assert supervisor.now().pid != process.pid


@cut
@pytest.mark.postgres
async def test_a_database_that_is_soon_back_ends_no_engine(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    lease_s = 9.0
    async with on(server, tmp_path, lease_s) as gateway:
        supervisor = supervisor_of(gateway)
        process = supervisor.now()
        caplog.set_level("WARNING", "gateway.supervisor")
        await asyncio.to_thread(server.stop, signal.SIGINT)
        await until(lambda: "could not be renewed" in caplog.text, lease_s)
        await asyncio.to_thread(server.start_again)
        back_at = time.monotonic()
        while time.monotonic() - back_at < lease_s * 2 / 3:
            assert supervisor.now() is process
            await asyncio.sleep(0.1)
        assert supervisor.epoch == 1
