"""From the gateway's socket to an engine process elsewhere and back, with everything but Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from engines.interface import EngineConfig
from engines.messages import (
    EXIT_OWNER_GONE,
    FromEngine,
    Hello,
    Load,
    LoadFailed,
    Perform,
    Performed,
    Ready,
    RunAddress,
    Stop,
    ToEngine,
    pack,
    unpack_from_engine,
)
from engines.on_ray.channel import Keys, Listener
from engines.on_ray.relay import GONE, SIGN, Ended, Relay, Wake
from engines.operations import CreateRun, LoraSpec, encode
from engines.vitals import Doing, Vitals
from tests.on_ray.cluster import ROOT
from tests.served import has_ended
from tests.threads import beside

PATIENCE_S = 30.0
OWNER_TIMEOUT_S = 20.0
LAST_WORD_S = 0.5

Message = TypeVar("Message", bound=FromEngine)


class Line:
    """A gateway's end, the two relays, and an engine process, in so many processes as on a cluster."""

    def __init__(self, storage: Path, owner_timeout_s: float = OWNER_TIMEOUT_S, **settings: Any) -> None:
        self.config = EngineConfig(
            **{
                "name": "far",
                "plugin": "fake",
                "base_model": "fake/model",
                "model": "fake/model",
                "roles": ("train", "sample"),
                "storage": str(storage),
                "epoch": 5,
                **settings,
            }
        )
        self.vitals = Vitals.create()
        self.wake = Wake()
        self._folder = tempfile.TemporaryDirectory(prefix="line-")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.gateway = self._context.socket(zmq.DEALER)
        self.gateway.bind(f"ipc://{self._folder.name}/gateway.sock")
        inner = self._context.socket(zmq.DEALER)
        inner.connect(f"ipc://{self._folder.name}/gateway.sock")
        self.place = subprocess.Popen(
            [sys.executable, "-m", "tests.on_ray.place_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self._tell(["", str(storage / "mark")])
        assert self.place.stdout is not None
        self.introduction = json.loads(self.place.stdout.readline())
        self.listener = Listener("127.0.0.1", self.introduction["public_key"].encode())
        self._tell([self.listener.address, self.listener.public_key.decode(), owner_timeout_s])
        relay = Relay(inner, self.listener, self.vitals, self.wake, LAST_WORD_S)
        self.ended: Future[Ended] = beside(relay.run)
        self._inner = inner

    def _tell(self, what: list[Any]) -> None:
        assert self.place.stdin is not None
        self.place.stdin.write(json.dumps(what).encode() + b"\n")
        self.place.stdin.flush()

    def send(self, message: ToEngine, *payloads: bytes) -> None:
        self.gateway.send_multipart(pack(message, *payloads))

    def receive(self, wanted: type[Message]) -> tuple[Message, list[bytes]]:
        assert self.gateway.poll(int(PATIENCE_S * 1000)), "nothing came"
        message, payloads = unpack_from_engine(self.gateway.recv_multipart())
        assert isinstance(message, wanted), message
        return message, payloads

    def load(self) -> int:
        """Have the engine loaded; the id of its process."""
        hello, _ = self.receive(Hello)
        self.send(Load(self.config))
        self.receive(Ready)
        return hello.pid

    def close(self) -> None:
        """Leave no process, thread or folder behind."""
        self.place.kill()
        self.place.wait()
        for stream in (self.place.stdin, self.place.stdout):
            if stream is not None:
                stream.close()
        self.wake.tell(GONE)
        self.ended.result(PATIENCE_S)
        self._inner.close()
        self.gateway.close()
        self._context.destroy(linger=0)
        self.listener.close()
        self.vitals.close()
        self.wake.close()
        self._folder.cleanup()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    (tmp_path / "mark").touch()
    made = Line(tmp_path)
    yield made
    made.close()


def create_run(line: Line, call_id: int) -> None:
    spec = LoraSpec(rank=4, seed=1)
    line.send(
        Perform(call_id, line.config.epoch, "create_run", [RunAddress(f"run-{call_id}", 0)]),
        encode(CreateRun(spec)),
    )


def until_ended(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


def test_a_place_says_what_it_is(line: Line) -> None:
    told = line.introduction
    assert (told["storage"], told["host"], bool(told["python"])) == (True, os.uname().nodename, True)


def test_calls_and_answers_pass_through(line: Line) -> None:
    line.load()
    for call_id in (1, 2, 3):
        create_run(line, call_id)
    for call_id in (1, 2, 3):
        performed, results = line.receive(Performed)
        assert (performed.call_id, performed.outcomes[0].failure, len(results)) == (call_id, None, 1)


def test_the_page_here_says_what_the_page_there_says(line: Line) -> None:
    line.load()
    first = line.vitals.read()
    deadline = time.monotonic() + PATIENCE_S
    while line.vitals.read().beats <= first.beats:
        assert time.monotonic() < deadline, "its heart is not seen to beat"
        time.sleep(0.02)
    create_run(line, 1)
    line.receive(Performed)
    while line.vitals.read().progress <= first.progress:
        assert time.monotonic() < deadline, "its call is not seen"
        time.sleep(0.02)
    assert line.vitals.read().doing is Doing.NOTHING


def test_a_stop_ends_it_well(line: Line) -> None:
    pid = line.load()
    line.send(Stop())
    assert line.ended.result(PATIENCE_S).status == 0
    until_ended(pid)


def test_a_killed_engine_is_told_of_by_its_signal(line: Line) -> None:
    os.kill(line.load(), signal.SIGKILL)
    assert line.ended.result(PATIENCE_S).status == -signal.SIGKILL


def test_why_a_model_cannot_be_loaded_is_told_before_the_end(tmp_path: Path) -> None:
    line = Line(tmp_path, options={"unheard_of": 1})
    try:
        line.receive(Hello)
        line.send(Load(line.config))
        assert line.ended.result(PATIENCE_S).status == 1
        failed, _ = line.receive(LoadFailed)
        assert "unheard_of" in failed.message
    finally:
        line.close()


def test_an_engine_whose_gateway_is_silent_ends(tmp_path: Path) -> None:
    line = Line(tmp_path, owner_timeout_s=1.0)
    try:
        pid = line.load()
        for _ in range(15):  # as long as there are signs of life it stays, however long that is
            line.wake.tell(SIGN)
            time.sleep(0.1)
        assert not has_ended(pid)
        assert line.ended.result(PATIENCE_S).status == EXIT_OWNER_GONE
        until_ended(pid)
    finally:
        line.close()


def test_an_engine_dies_with_its_place_also_when_it_is_stopped(line: Line) -> None:
    pid = line.load()
    os.kill(pid, signal.SIGSTOP)
    line.place.kill()
    until_ended(pid)


def test_a_lost_place_is_no_exit_status(line: Line) -> None:
    line.load()
    before = time.monotonic()
    line.place.kill()
    line.wake.tell(GONE)
    ended = line.ended.result(PATIENCE_S)
    assert ended.status is None
    assert ended.heard_at is not None
    assert ended.heard_at <= before + PATIENCE_S


def test_a_place_that_never_comes_is_told_apart_from_one_that_is_lost(line: Line) -> None:
    """And what the gateway has said meanwhile keeps nobody waiting."""
    listener = Listener("127.0.0.1", Keys.new().public)
    wake = Wake()
    with zmq.Context() as context, context.socket(zmq.DEALER) as inner:
        inner.bind("inproc://gateway")
        relay = Relay(inner, listener, line.vitals, wake, LAST_WORD_S)
        wake.tell(SIGN)
        wake.tell(GONE)
        assert beside(relay.run).result(PATIENCE_S) == (None, None)
    listener.close()
    wake.close()
