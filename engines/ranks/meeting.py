"""How the ranks of an engine find each other: by a file, where rank 0 has started the others; by a socket on a node's
address, where they run on several machines.

Whoever reaches the sockets of gloo, or a store that listens, is let in. So the ranks of one machine use its loopback
interface and a folder that nobody else may read; those of several the one address that the cluster knows a node by.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from engines.interface import LoadError, Meeting

_FileStore: Any = vars(dist)["FileStore"]  # both are missing in torch's own types
_TcpStore: Any = vars(dist)["TCPStore"]
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15


class Post(NamedTuple):
    """A store of torch's that all ranks reach, and the network interface on which they then speak to each other."""

    store: Any
    interface: str


class Terms(NamedTuple):
    """What rank 0 tells by the store to those that others have started: seconds, and the kind of device."""

    timeout_s: float
    start_timeout_s: float
    device: str


def by_file(path: Path, size: int) -> Post:
    """On this machine; `path` is new, and the same for all."""
    return Post(_FileStore(str(path), size), _loopback())


def lead(meeting: Meeting, terms: Terms) -> Post:
    """Rank 0's, which keeps the store. Raises LoadError."""
    host, port = _parts(meeting.address)
    interface = interface_of(host)
    store = _TcpStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=terms.start_timeout_s),
        wait_for_workers=False,
        master_listen_fd=meeting.descriptor,
    )
    store.set("timeout", repr(terms.timeout_s))
    store.set("start_timeout", repr(terms.start_timeout_s))
    store.set("device", terms.device)
    return Post(store, interface)


def come(address: str, own_ip: str, patience_s: float) -> tuple[Post, Terms]:
    """Another rank's, on a machine that the others know by `own_ip`. Raises LoadError, and RuntimeError when rank 0 is
    not there within so many seconds."""
    host, port = _parts(address)
    interface = interface_of(own_ip)
    store = _TcpStore(host, port, is_master=False, timeout=timedelta(seconds=patience_s))
    terms = Terms(
        float(store.get("timeout")), float(store.get("start_timeout")), store.get("device").decode()
    )
    return Post(store, interface), terms


def device_of(kind: str) -> torch.device:
    """Of a rank that sees the device that it was given, and no other."""
    return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


def interface_of(ip: str) -> str:
    """The network interface of this machine that has an address (IPv4). Raises LoadError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            wanted = struct.pack("256s", name.encode()[:_NAME_BYTES])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, wanted)
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    raise LoadError(
        f"no network interface of this machine has the address {ip}, by which its cluster knows it"
    )


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else "lo0"


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
