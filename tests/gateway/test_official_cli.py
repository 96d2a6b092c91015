"""The `tinker` command line of the official SDK, as far as it tells who one is and what one has used."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.gateway.conftest import datum
from tests.gateway.test_keys import make_key
from tests.official import COMMAND_LINE
from tests.served import ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


def run(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a shell runs it: the SDK keeps connections for as long as its process lives."""
    command = [sys.executable, "-c", COMMAND_LINE, *arguments]
    return subprocess.run(command, check=False, input=given, capture_output=True, text=True, timeout=60)


def printed(*arguments: str) -> Any:
    done = run("--format", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_one_logs_in_looks_and_logs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = ServedGateway(tmp_path / "cli")
    key = make_key(gateway, "ann@example.org", "--label", "laptop")
    gateway.start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TINKER_BASE_URL", gateway.url)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    try:
        assert "not known here" in run("auth", "login", given="tml-wrong\n").stderr
        assert "Logged in as ann@example.org (tandem)" in run("auth", "login", given=f"{key}\n").stdout
        assert run("auth", "status").returncode == 0
        assert "tml:user:ann@example.org" in run("auth", "whoami").stdout
        assert "laptop" in run("auth", "logout").stdout
        assert run("auth", "whoami").returncode != 0
    finally:
        gateway.stop()
        gateway.close()


def test_usage_and_timeline_are_told(
    served: ServedGateway, service: tinker.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", served.url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    client = service.create_lora_training_client("fake/model", rank=4).result()
    client.forward_backward([datum(0, 13)], "cross_entropy").result()
    client.save_state("one").result()
    session_id = service.holder.get_session_id()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = ((hour - timedelta(hours=1)).isoformat(), (hour + timedelta(hours=1)).isoformat())
    usage = json.dumps(printed("billing", "usage", *window))
    assert session_id in usage
    assert '"token_count": 13' in usage
    assert run("billing", "usage", *window).returncode == 0
    table = tmp_path / "usage.csv"
    assert run("billing", "usage", *window, "--csv", str(table)).returncode == 0
    assert session_id in table.read_text()
    assert printed("billing", "checkpoint-storage")
    trace = tmp_path / "trace.pftrace"
    assert run("session", "export-trace", session_id, "--output", str(trace)).returncode == 0
    assert "forward_backward" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    url = run("session", "export-trace", session_id, "--url-only").stdout
    assert f"/sessions/{session_id}/trace?expires=" in url.replace("%3A", ":")
