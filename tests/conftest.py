"""Fixtures for every test: a real PostgreSQL, one server for the whole run, one database for each test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.postgres import PostgresServer

# A busy machine is no failure; what must be fast has a deadline of its own.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_LEAVES_WITHIN_S = 20.0
VLLM_PYTHON = "TANDEM_TEST_VLLM_PYTHON"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is in a background job of a shell, and would be in every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _bounded_goodbyes() -> Iterator[None]:
    """The official SDK (0.38) leaves by cancelling its heartbeat and waiting for that. On Python 3.11 a cancellation
    that comes with a heartbeat's answer is lost, and the wait has no end: here it has."""

    def leave(service: Any, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            service.close("success" if kind is None else "errored").result(timeout=_LEAVES_WITHIN_S)

    with pytest.MonkeyPatch.context() as patch:
        if (tinker := sys.modules.get("tinker")) is not None:  # else no test that was collected uses it
            patch.setattr(tinker.ServiceClient, "__exit__", leave)
        yield


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of an environment that `python -m engines.vllm.environment` has made."""
    found = os.environ.get(VLLM_PYTHON)
    if not found:
        pytest.skip(
            f"{VLLM_PYTHON} names no interpreter; `python -m engines.vllm.environment PATH` makes one"
        )
    return found


@pytest.fixture(scope="session")
def pg_server() -> Iterator[PostgresServer]:
    """The server, started by the first test that needs it."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def _pg_template(pg_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with the current schema, made by the operator's own command; each test gets a copy."""
    name = pg_server.create_database()
    environment = {
        **os.environ,
        "TANDEM_DATABASE_URL": pg_server.url(name),
        "TANDEM_DATA_DIR": str(tmp_path_factory.mktemp("migrate")),
    }
    command = [sys.executable, "-m", "gateway.migrate"]
    subprocess.run(command, check=True, env=environment, timeout=60, stdout=subprocess.DEVNULL)
    return name


@pytest.fixture
def pg_url(pg_server: PostgresServer, _pg_template: str) -> Iterator[str]:
    """URL of a database of this test's own, with the current schema."""
    name = pg_server.create_database(template=_pg_template)
    yield pg_server.url(name)
    pg_server.drop_database(name)


@pytest.fixture
def empty_pg_url(pg_server: PostgresServer) -> Iterator[str]:
    """URL of a database of this test's own, with nothing in it."""
    name = pg_server.create_database()
    yield pg_server.url(name)
    pg_server.drop_database(name)
