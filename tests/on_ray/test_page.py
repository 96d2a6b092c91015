"""The commands of docs/ray.md, run in their order, make a cluster that an engine runs on."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from engines.messages import Hello, Load, Ready, Stop
from tests.docs.pages import blocks, page
from tests.on_ray.standing_in import PATIENCE_S, start
from tests.served import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


WORKERS_TO = 19_999
"""Ray's workers have the ports up to this one."""


def lines(block: str, port: int) -> list[str]:
    """What a shell would run, at an address of this machine."""
    here = block.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    here = here.replace("10.0.0.5", "127.0.0.1").replace("6379", str(port))
    return here.strip().splitlines()


@contextmanager
def staying(command: str) -> Iterator[None]:
    """One that stays until it is stopped, with all that it has started."""
    process = subprocess.Popen(shlex.split(command), start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None, command
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def until_open(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the head does not listen"
        time.sleep(0.2)


def test_the_commands_of_the_page_make_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port = next(found for found in iter(free_port, None) if found > WORKERS_TO)
    head, node, gateway = [lines(block, port) for block in blocks(page("ray.md"), "sh")]
    assert {head[0], node[0], gateway[0]} == {"export RAY_AUTH_MODE=token"}
    assert gateway[1].endswith("tandem serve") and len(gateway) == len(node) == 2
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    subprocess.run(["bash", "-ec", "\n".join(head[1:-1])], check=True, timeout=60)
    assert (tmp_path / ".ray" / "auth_token").read_text().strip()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True)
        )
        monkeypatch.setenv("RAY_TMPDIR", folder)  # several clusters on a machine, in tests only
        stack.enter_context(staying(head[-1]))
        until_open(port)
        stack.enter_context(staying(node[-1]))
        owner = stack.enter_context(start(tmp_path, address=f"127.0.0.1:{port}", wait_s=PATIENCE_S))
        owner.receive(Hello, PATIENCE_S)
        owner.send(Load(owner.config))
        assert owner.receive(Ready, PATIENCE_S).info.base_model == "test/bytes"
        owner.send(Stop())
        assert owner.process.wait(PATIENCE_S) == 0
