"""What docs/errors.md says of the official SDK is what it does."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tinker

from gateway.tinker import wire_pb2 as wire
from tests.docs.pages import page, rows

KEY = "tml-statuses"
TIMES = 2
"""So often the status is answered before the call succeeds."""

RUN = {
    "training_run_id": "r",
    "base_model": "m/n",
    "model_owner": "o",
    "is_lora": True,
    "last_request_time": "2026-01-01T00:00:00Z",
}
ANSWERS = {
    "/api/v1/client/config": {},
    "/api/v1/client/dynamic_config": {},
    "/api/v1/create_session": {"session_id": "s"},
    "/api/v1/session_heartbeat": {},
    "/api/v1/telemetry": {"status": "accepted"},
    "/api/v1/sessions/s/finish": {},
    "/api/v1/create_sampling_session": {"sampling_session_id": "x"},
    "/api/v1/samplers/x": {"sampler_id": "x", "base_model": "m/n"},
    "/api/v1/asample": {"request_id": "f", "sample_sequence_ids": ["f:0"]},
    "/api/v1/training_runs/r": RUN,
}
CALLS = {
    "most calls": "/api/v1/training_runs/r",
    "asample": "/api/v1/asample",
    "retrieve_future": "/api/v1/retrieve_future",
}


class Stub(ThreadingHTTPServer):
    """Answers one path with a status, some times, and everything with success otherwise."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.calls: Counter[str] = Counter()
        self.refused = ("", 200)


class _Answering(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.calls[path] += 1
        refused, status = self.server.refused
        if path == refused and status != 200 and self.server.calls[path] <= TIMES:
            self._answer(status, b'{"detail": "no"}', "application/json")
        elif path == "/api/v1/retrieve_future":
            self._answer(200, _sample(), "application/x-protobuf")
        else:
            self._answer(200, json.dumps(ANSWERS[path]).encode(), "application/json")

    do_POST = do_GET

    def _answer(self, status: int, body: bytes, media_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


def _sample() -> bytes:
    message = wire.SampleResponse()
    message.sequences.add(tokens=b"\1\0\0\0", logprobs=b"\0\0\0\0")
    return message.SerializeToString()


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def described() -> list[tuple[int, str, str]]:
    """Status, kind of call, and the first word of what the SDK does."""
    found = []
    for row in rows(page("errors.md")):
        if row[0].isdigit() and all(row[2:5]):
            words = [cell.partition(",")[0].partition(":")[0] for cell in row[2:5]]
            found += [(int(row[0]), call, word) for call, word in zip(CALLS, words, strict=True)]
    return found


@pytest.mark.parametrize(("status", "call", "effect"), described())
@pytest.mark.usefixtures("hurried_sdk")
def test_the_sdk_does_what_is_described(stub: Stub, status: int, call: str, effect: str) -> None:
    stub.calls.clear()
    stub.refused = (CALLS[call], status)
    url = f"http://127.0.0.1:{stub.server_address[1]}"
    if effect == "raises":
        with pytest.raises((tinker.TinkerError, ValueError)):
            _make(url, call)
        assert stub.calls[CALLS[call]] == 1
    else:
        _make(url, call)
        repeats = 0 if effect == "goes on" else TIMES
        assert effect in ("goes on", "repeats")
        assert stub.calls[CALLS[call]] == 1 + repeats


def _make(url: str, call: str) -> None:
    if call == "most calls":
        rest = tinker.RestClient(base_url=url, api_key=KEY)
        assert rest.get_training_run("r").result(timeout=30).base_model == "m/n"
        return
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model="m/n").result(timeout=30)
        params = tinker.SamplingParams(max_tokens=1)
        prompt = tinker.ModelInput.from_ints([1])
        assert sampler.sample(prompt, 1, params).result(timeout=30).sequences[0].tokens == [1]
