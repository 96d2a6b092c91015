"""An engine that cannot load its model says what to change, and keeps nobody waiting for it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

import gateway.supervisor
from gateway.app import running_gateway
from gateway.engine_settings import EngineSettings
from gateway.errors import EngineUnavailable, ModelNotLoadable
from gateway.settings import Settings
from gateway.supervisor import EngineState
from tests.gateway.conftest import KEY, begin_run, clean, outcome
from tests.served import FAKE_ENGINE, ServedGateway

SENTENCE = "unknown field `delay`"
BROKEN = {"name": "typo", "plugin": "fake", "base_model": "fake/typo", "options": {"delay": 1}}
WITHOUT_PYTHON = {"name": "bare", "plugin": "fake", "base_model": "fake/bare", "python": "/no/such/python"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """Two engines that can never start beside one that does."""
    served = ServedGateway(tmp_path_factory.mktemp("failed"), [BROKEN, WITHOUT_PYTHON, FAKE_ENGINE])
    served.launch()
    try:
        deadline = time.monotonic() + 60
        while not _settled(served):
            assert time.monotonic() < deadline, served.log.read_text()
            time.sleep(0.1)
        yield served
        assert served.stop() == 0
    finally:
        served.close()


def _settled(served: ServedGateway) -> bool:
    try:
        states = httpx.get(f"{served.url}/readyz", timeout=5).json()["engines"]
    except httpx.TransportError:
        return False
    return [str(state).partition(":")[0] for state in states.values()] == ["failed", "failed", "ready"]


@pytest.fixture
def http(served: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=20) as client:
        yield client


def test_it_is_shown_with_its_reason_and_is_not_started_over_and_over(http: httpx.Client) -> None:
    time.sleep(2)  # an engine that died would have been started twice in this time
    engines = {engine["name"]: engine for engine in http.get("/admin/v1/engines").json()["items"]}
    assert engines["typo"]["state"] == "failed"
    assert SENTENCE in engines["typo"]["problem"]
    assert "'/no/such/python'" in engines["bare"]["problem"]
    assert [engines[name]["starts"] for name in ("typo", "bare", "fake")] == [1, 1, 1]
    assert engines["typo"]["pid"] is None
    assert SENTENCE in http.get("/readyz").json()["engines"]["typo"]


def test_the_official_sdk_is_told_at_once(served: ServedGateway) -> None:
    started = time.monotonic()
    with tinker.ServiceClient(base_url=served.url, api_key=KEY) as service:
        with pytest.raises(tinker.BadRequestError, match=SENTENCE):
            service.create_lora_training_client("fake/typo", rank=4).result()
        with pytest.raises(tinker.BadRequestError, match=SENTENCE):
            service.create_sampling_client(base_model="fake/typo").result()
    assert time.monotonic() - started < 10


def test_openais_clients_are_told_at_once(http: httpx.Client) -> None:
    body = {"model": "fake/typo", "messages": [{"role": "user", "content": "hello"}]}
    error = clean(http.post("/v1/chat/completions", json=body))["error"]
    assert SENTENCE in error["message"]
    assert error["code"] == "model_not_loadable"


def test_who_brings_an_adapter_is_told_at_once(http: httpx.Client) -> None:
    """Nothing of the body is received, so it need not be a tar."""
    where = {"base_model": "fake/typo", "name": "mine"}
    tar = {"Content-Type": "application/x-tar"}
    refused = http.post("/admin/v1/checkpoints", params=where, content=b"-", headers=tar)
    assert refused.status_code == 400
    assert SENTENCE in refused.json()["detail"]
    assert refused.json()["code"] == "model_not_loadable"


def test_other_models_are_served(http: httpx.Client) -> None:
    assert begin_run(http)


def test_what_was_accepted_before_is_told_too(tmp_path: Path) -> None:
    """A sample that came while the engine was away; it does not come back."""
    python = tmp_path / "python"
    write_python(python)
    served = ServedGateway(
        tmp_path / "data", [{**FAKE_ENGINE, "python": str(python)}], hold_s="0.5", engine_restart_delay_s="2"
    )
    served.start()
    try:
        with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=20) as http:
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
            sampler = http.post("/api/v1/create_sampling_session", json=sampling).json()[
                "sampling_session_id"
            ]
            python.unlink()
            os.kill(served.engine_pids()[0], signal.SIGKILL)
            prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
            body = {"sampling_session_id": sampler, "seq_id": 1, "prompt": prompt}
            body["sampling_params"] = {"max_tokens": 2}
            promise = http.post("/api/v1/asample", json=body).json()
            told = outcome(http, promise["request_id"])
        assert told["category"] == "user"
        assert "cannot be run: No such file" in told["error"]
    finally:
        served.close()


def write_python(path: Path) -> None:
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)


class Engine:
    """A gateway in this process, whose only engine has an interpreter that may not be there."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "python"
        engine = EngineSettings(name="late", base_model="fake/model", plugin="fake", python=str(self.python))
        self.settings = Settings(data_dir=folder / "data", engines=(engine,))

    def install(self) -> None:
        """What an operator does about it."""
        write_python(self.python)


async def _until(supervisor: Any, state: EngineState) -> None:
    async with asyncio.timeout(30):
        while supervisor.state is not state:  # noqa: ASYNC110 - it tells nobody but the dispatcher
            await asyncio.sleep(0.02)


async def test_it_is_tried_again_and_serves_when_somebody_has_put_it_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.supervisor, "_FAILED_DELAY_S", 0.2)
    engine = Engine(tmp_path)
    async with running_gateway(engine.settings) as running:
        supervisor = running.fleet.dispatchers["late"].supervisor
        await _until(supervisor, EngineState.FAILED)
        with pytest.raises(ModelNotLoadable, match="cannot be run: No such file"):
            supervisor.now()
        engine.install()
        await _until(supervisor, EngineState.READY)
        supervisor.require_loadable()
        assert supervisor.problem is None
        pid = supervisor.now().pid
        supervisor.now()._process.kill()  # type: ignore[union-attr]
        await _until(supervisor, EngineState.DOWN)
        assert supervisor.tokenizer_files  # clients that connect meanwhile get them
        with pytest.raises(EngineUnavailable, match="killed by signal 9"):
            supervisor.now()
        await _until(supervisor, EngineState.READY)
        assert supervisor.now().pid != pid


async def test_a_clean_stop_is_no_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(tmp_path)
    engine.install()
    with caplog.at_level(logging.WARNING, "gateway"):
        async with running_gateway(engine.settings) as running:
            await _until(running.fleet.dispatchers["late"].supervisor, EngineState.READY)
    assert [record.getMessage() for record in caplog.records] == []
