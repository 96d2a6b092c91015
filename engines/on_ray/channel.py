"""The connection between the two relays: TCP with CURVE, whose keys are made anew for each start of an engine.

Each side knows the other's public key from Ray, which answers only who has its token; a secret key leaves no process.
What is sent arrives in order. There is no second connection: what a lost one had under way would be missing, so
then both sides fall silent, and whoever listens ends the engine.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

Frames = list[zmq.Frame]
LINGER_MS = 2000
_DOMAIN = "tandem"
_STATUS = struct.Struct("<i")


class Kind(bytes, enum.Enum):
    """First frame of what the relays send."""

    MESSAGE = b"m"  # the frames of a message, either way
    ALIVE = b"."  # to the node: the gateway has given a sign of life
    PAGE = b"v"  # from the node: a copy of the page of vital signs
    END = b"e"  # from the node, the last one: the last copy of the page, and the exit status


class Keys(NamedTuple):
    """A pair of CURVE keys in Z85."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> Keys:
        return cls(*zmq.curve_keypair())


class Listener:
    """The end on the gateway's machine, on a port that the system chooses. One process is let in: the one that has the
    secret key of `guest`."""

    def __init__(self, ip: str, guest: bytes) -> None:
        self._keys = Keys.new()
        self._guest = guest
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IPV6, ":" in ip)
        self.socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
        self.socket.curve_server = True
        self.socket.curve_secretkey = self._keys.secret
        self.socket.curve_publickey = self._keys.public
        self.port = self.socket.bind_to_random_port(f"tcp://[{ip}]" if ":" in ip else f"tcp://{ip}")

    @property
    def public_key(self) -> bytes:
        """What a guest must know to be sure whom it speaks to."""
        return self._keys.public

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator: whether a key may come in."""
        return key == self._guest

    def close(self) -> None:
        """Let nobody in any more; what has not been sent is dropped."""
        self.socket.close()
        self._authenticator.stop()
        self._context.term()


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, keys: Keys, server: bytes
) -> zmq.Socket[bytes]:
    """The end on the node. `server` is the public key of the listener."""
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.curve_publickey, socket.curve_secretkey = keys
    socket.curve_serverkey = server
    socket.connect(address)
    return socket


def end_of(page: bytes, status: int) -> list[bytes]:
    """The last thing that is sent from a node; `status` as `subprocess` gives it: negative for a signal."""
    return [Kind.END, page, _STATUS.pack(status)]


def status_of(packed: bytes) -> int:
    """The exit status in the last frame of `end_of`. Raises struct.error."""
    status: int = _STATUS.unpack(packed)[0]
    return status
