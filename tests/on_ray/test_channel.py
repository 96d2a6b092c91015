"""Who may speak on the connection between the relays, and what becomes of what a stranger sends."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from engines.on_ray.channel import Keys, Kind, Listener, connect, end_of, status_of

PATIENCE_MS = 30_000
A_WHILE_MS = 500

GUEST = Keys.new()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1", GUEST.public)
    yield made
    made.close()


Connecting = Callable[..., zmq.Socket[bytes]]


@pytest.fixture
def connected() -> Iterator[Connecting]:
    """Makes the other end; what a stranger has not got rid of is dropped in the end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []

    def made(address: str, keys: Keys, server: bytes) -> zmq.Socket[bytes]:
        sockets.append(connect(context, address, keys, server))
        return sockets[-1]

    yield made
    context.destroy(linger=0)


def test_the_guest_is_heard_and_answered(listener: Listener, connected: Connecting) -> None:
    guest = connected(listener.address, GUEST, listener.public_key)
    guest.send_multipart([Kind.MESSAGE, b"header", b"x" * 100_000])
    assert listener.socket.poll(PATIENCE_MS)
    assert listener.socket.recv_multipart() == [b"m", b"header", b"x" * 100_000]
    listener.socket.send(Kind.ALIVE)
    assert guest.poll(PATIENCE_MS)
    assert guest.recv() == b"."


def test_other_keys_are_not_let_in(listener: Listener, connected: Connecting) -> None:
    """A stranger knows the listener's public key at most. That it was not merely slow is seen by the guest, who comes
    later and is heard."""
    stranger = connected(listener.address, Keys.new(), listener.public_key)
    stranger.send_multipart([Kind.MESSAGE, b"let me in"])
    assert not listener.socket.poll(A_WHILE_MS)
    guest = connected(listener.address, GUEST, listener.public_key)
    guest.send(Kind.PAGE)
    assert listener.socket.poll(PATIENCE_MS)
    assert listener.socket.recv() == b"v"
    assert not listener.socket.poll(A_WHILE_MS)


def test_a_guest_says_nothing_to_another_listener(listener: Listener, connected: Connecting) -> None:
    guest = connected(listener.address, GUEST, Keys.new().public)
    guest.send_multipart([Kind.MESSAGE, b"for somebody else"])
    assert not listener.socket.poll(A_WHILE_MS)


def test_without_curve_nobody_is_understood(listener: Listener) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.setsockopt(zmq.LINGER, 0)
        plain.connect(listener.address)
        plain.send_multipart([Kind.MESSAGE, b"in the clear"])
        assert not listener.socket.poll(A_WHILE_MS)


def test_what_is_sent_cannot_be_read_on_the_way(listener: Listener, connected: Connecting) -> None:
    """Everything that passes between the two is seen by somebody between them, who finds no word of it."""
    secret = b"the gradient of somebody else"
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as between:
        guest = connected(f"tcp://127.0.0.1:{between.getsockname()[1]}", GUEST, listener.public_key)
        guest.send_multipart([Kind.MESSAGE, secret])
        here, _ = between.accept()
        with here, socket.create_connection(("127.0.0.1", listener.port)) as there:
            here.setblocking(False)
            there.setblocking(False)
            deadline = time.monotonic() + PATIENCE_MS / 1000
            while not listener.socket.poll(1) and time.monotonic() < deadline:
                _pass_on(here, there, seen)
                _pass_on(there, here, seen)
            assert listener.socket.recv_multipart(zmq.NOBLOCK) == [b"m", secret]
    assert len(seen) > len(secret)
    assert secret not in seen


def _pass_on(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    try:
        data = source.recv(65536)
    except BlockingIOError:
        return  # nothing has come
    seen += data
    target.sendall(data)


@pytest.mark.parametrize("status", [0, 3, 137, -9, -11])
def test_an_exit_status_travels_as_it_is(status: int) -> None:
    kind, page, packed = end_of(b"page", status)
    assert (kind, page, status_of(packed)) == (b"e", b"page", status)
