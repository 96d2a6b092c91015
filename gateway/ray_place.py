"""The setting `ray` of an engine: where in a Ray cluster it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from gateway.errors import ConfigurationError

LOCAL = "local"
_ADDRESS = re.compile(r"[^\s/@]+:[0-9]{1,5}")
_LARGEST_PORT = 65535
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class RayPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine process needs of a node. All of it is on one node, or that of each rank is."""

    address: str
    """`host:port` of a running cluster of which the gateway's machine is a node; `local`: one is started for this
    engine, and ends with it."""
    cpus: float = 1.0
    """CPUs, as Ray counts them; an engine computes with so many threads unless its options say otherwise."""
    gpus: float = 0.0
    """GPUs; it sees no others."""
    resources: dict[str, float] = {}
    """Amounts of the cluster's own resources."""
    labels: dict[str, str] = {}
    """Labels that the node must have, with these values."""
    ranks: int = 1
    """Processes of an engine that spreads a model over several, each of which gets all of this; they may be on several
    nodes."""
    wait_s: float = 30.0
    """Seconds for which a free node that has all of this is waited for, at each start."""


class Placed(NamedTuple):
    """An engine with such a place: its name, how many replicas there may be, the devices that its settings name."""

    name: str
    place: RayPlace
    replicas: int
    devices: Sequence[str]


def check_ray(engines: Sequence[Placed]) -> None:
    """What types cannot say of the engines that run on Ray. Raises ConfigurationError."""
    for engine in engines:
        _check_place(engine.name, engine.place)
        if engine.devices:
            raise ConfigurationError(
                f"engines: devices of {engine.name!r} are of this machine; on Ray it gets ray.gpus of its node's"
            )
    own = [engine for engine in engines if engine.place.address == LOCAL]
    if sum(engine.replicas for engine in own) > 1:
        raise ConfigurationError(
            f"engines: {', '.join(engine.name for engine in own)}: several processes with ray.address {LOCAL} would "
            "each start a cluster that takes itself for the only one: run `ray start --head` and give its address"
        )


def _check_place(name: str, place: RayPlace) -> None:
    port = place.address.rpartition(":")[2]
    if place.address != LOCAL and not (_ADDRESS.fullmatch(place.address) and int(port) <= _LARGEST_PORT):
        raise ConfigurationError(
            f"engines: ray.address of {name!r} is {place.address!r}; it must be host:port of a cluster, or {LOCAL}"
        )
    for what, amount in {"cpus": place.cpus, "gpus": place.gpus, **place.resources}.items():
        _check_amount(name, what, amount)
    if place.ranks < 1 or (place.ranks > 1 and not any((place.cpus, place.gpus, *place.resources.values()))):
        raise ConfigurationError(
            f"engines: ray.ranks of {name!r} is {place.ranks}; it must be at least 1, and several need something"
        )
    if not 0 < place.wait_s < math.inf:
        raise ConfigurationError(
            f"engines: ray.wait_s of {name!r} is {place.wait_s}; it must be above 0 seconds"
        )
    for label, value in place.labels.items():
        if not _LABEL.fullmatch(value):
            raise ConfigurationError(
                f"engines: ray.labels of {name!r}: {label} is {value!r}; it must be letters, digits, '.', '-' and '_'"
            )


def _check_amount(engine: str, what: str, amount: float) -> None:
    """Ray gives parts of one, and whole numbers above."""
    if not 0 <= amount < math.inf or (amount > 1 and amount != int(amount)):
        raise ConfigurationError(
            f"engines: ray of {engine!r} wants {amount} of {what}; it must be from 0 to 1, or a whole number"
        )
