"""The fixed address: whoever is there answers, whole or not at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.faults.proxy import FailOver

Answer = Callable[[bytes], bytes]


@contextmanager
def server(answer: Answer) -> Iterator[int]:
    """Answers one request a connection with raw bytes; its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.sendall(answer(connection.recv(65536)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


def said(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)


def nobody() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


def test_the_next_gateway_answers_when_the_first_is_not_there() -> None:
    with server(lambda request: said(200, b"second")) as port:
        with FailOver([nobody(), port], {}).running() as proxy:
            for _ in range(3):
                assert httpx.get(proxy.url).text == "second"
        assert proxy.happened["status 200"] == 3
        assert proxy.refusals == []


def test_half_an_answer_is_none() -> None:
    with (
        server(lambda request: said(200, b"whole")[:-2]) as port,
        FailOver([port], {}).running() as proxy,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        httpx.get(proxy.url)


def test_nobody_is_a_broken_connection() -> None:
    with FailOver([nobody()], {}).running() as proxy, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(proxy.url)


def test_what_a_client_must_not_see_is_kept() -> None:
    statuses = {b"/later": 503, b"/bug": 500, b"/session_heartbeat": 410}
    with server(lambda request: said(statuses[request.split(b" ")[1]], b"oh")) as port:
        with FailOver([port], {}).running() as proxy:
            assert httpx.get(f"{proxy.url}/later").status_code == 503
            assert httpx.get(f"{proxy.url}/bug").status_code == 500
            assert httpx.get(f"{proxy.url}/session_heartbeat").status_code == 410
        [refusal] = proxy.refusals
        assert "/bug: 500 oh" in refusal


def test_a_gateway_that_stands_still_loses_its_requests_to_the_other() -> None:
    """One that accepts connections and says nothing, as a process that was stopped."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        server(lambda request: said(200, b"alive")) as port,
        FailOver([silent.getsockname()[1], port], {}).running() as proxy,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(proxy.url, timeout=30)  # it was under way when the silence was noticed
        assert httpx.get(proxy.url, timeout=30).text == "alive"
