"""The host's loop around an engine that draws by itself: it waits for the owner and for the engine at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from engines.host import EXIT_STOPPED, Host
from engines.interface import EngineConfig
from engines.messages import (
    Cancel,
    FromEngine,
    Ping,
    Pong,
    Sample,
    Sampled,
    SampleDelta,
    Stop,
    ToEngine,
    pack,
    unpack_from_engine,
)
from engines.operations import SampleRequest, SampleResult, decode_result, encode
from engines.tensors import Matrix, Tensor
from engines.vitals import Doing, Vitals
from tests.vllm.test_engine import Made

PATIENCE_S = 30.0
ASKED = SampleRequest(
    prompt=Tensor.of(np.array([1, 2, 3], dtype=np.int32)),
    num_samples=1,
    seed=1,
    max_tokens=3,
    stop_at_eos=False,
)
ONE_CELL = Matrix((2, 1), Tensor.of(np.array([[3], [4]], dtype=np.int64)))


class Owned:
    """A host in a thread, and its owner's end of the socket."""

    def __init__(self, made: Made, page: Vitals) -> None:
        self.made = made
        self.page = page
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind("inproc://host")
        inner = self._context.socket(zmq.PAIR)
        inner.connect("inproc://host")
        config = EngineConfig("v", "vllm", "m", "m", ("sample",), str(made.storage), 1)
        host = Host(inner, page, made.engine, made.engine.info(), config)
        self.status: int | None = None

        def serve() -> None:
            self.status = host.serve()
            inner.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()

    def send(self, message: ToEngine, *payloads: bytes) -> None:
        self._socket.send_multipart(pack(message, *payloads))

    def next(self) -> tuple[FromEngine, list[bytes]]:
        assert self._socket.poll(int(PATIENCE_S * 1000)), "nothing came"
        return unpack_from_engine(self._socket.recv_multipart())

    def end(self) -> None:
        self.send(Stop())
        self._thread.join(PATIENCE_S)
        self._socket.close()
        self._context.term()


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[Owned]:
    made = Made(tmp_path, eager=False)
    page = Vitals.create()
    one = Owned(made, page)
    yield one
    one.end()
    assert one.status == EXIT_STOPPED
    made.engine.close()
    page.close()


def test_what_comes_is_told_at_once_and_the_owner_is_heard_meanwhile(owned: Owned) -> None:
    owned.send(Sample(1, stream=True), encode(ASKED))
    owned.send(Ping())
    pong, _ = owned.next()
    assert isinstance(pong, Pong) and pong.stats["active_samples"] == 1
    for token in (4, 5, 6):
        owned.made.step()
        delta, _ = owned.next()
        assert isinstance(delta, SampleDelta) and delta.tokens == [token]
    sampled, payloads = owned.next()
    assert isinstance(sampled, Sampled) and (sampled.prompt_tokens, sampled.sampled_tokens) == (3, 3)
    result = decode_result(payloads[0])
    assert isinstance(result, SampleResult)


def test_while_it_draws_only_passes_are_progress(owned: Owned) -> None:
    """So that an engine that stands still is found, whatever its owner says meanwhile."""
    owned.send(Sample(1), encode(ASKED))
    owned.made.until(lambda: owned.page.read().doing is Doing.SAMPLING)
    before = owned.page.read()
    for _ in range(3):
        owned.send(Ping())
        owned.next()
    owned.made.until(lambda: owned.page.read().doing is Doing.SAMPLING)
    assert owned.page.read().progress == before.progress
    owned.made.step(3)
    owned.next()
    owned.made.until(lambda: owned.page.read().doing is Doing.NOTHING)


def test_an_engine_failure_is_the_samples_own(owned: Owned) -> None:
    owned.send(Sample(1), encode(ASKED))
    owned.made.llm.broken = RuntimeError("odd")
    owned.made.step()
    sampled, _ = owned.next()
    assert isinstance(sampled, Sampled) and sampled.failure is not None
    assert (sampled.failure.category, "odd" in sampled.failure.message) == ("server", False)


def test_a_cancelled_sample_says_nothing(owned: Owned) -> None:
    owned.send(Sample(1), encode(ASKED))
    owned.send(Cancel(1))
    owned.made.until(lambda: owned.made.llm.ends["aborted"] == 1 or not owned.made.llm.asked)
    owned.send(Ping())
    pong, _ = owned.next()
    assert isinstance(pong, Pong) and pong.stats["active_samples"] == 0


def test_what_it_does_not_tell_of_a_prompt_is_refused_by_name(owned: Owned) -> None:
    for change, name in (
        ({"prompt_alternatives": 1}, "prompt_alt_tokens_k"),
        ({"target_prompt_tokens": ONE_CELL}, "target_prompt_logprobs"),
    ):
        owned.send(Sample(1), encode(msgspec.structs.replace(ASKED, **change)))
        sampled, _ = owned.next()
        assert isinstance(sampled, Sampled) and sampled.failure is not None
        assert sampled.failure.category == "user" and name in sampled.failure.message
