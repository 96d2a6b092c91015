"""Finding a place in a Ray cluster: who may, where it is, what it must have; each obstacle is one sentence."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ray
from ray.exceptions import RayError

from engines.environment import variable
from engines.on_ray.place import Introduction, Place

log = logging.getLogger("engines.on_ray")

LOCAL = "local"
TOKEN_MODE = "RAY_AUTH_MODE"
_PROBE_S = 5.0
_LOOK_S = 1.0
_OBJECTS_BYTES = 80 << 20
"""Of a cluster that is started here: nothing is kept in Ray's object store."""


class NoPlace(Exception):
    """The engine cannot be placed; the message says why. When it is `final`, somebody has to change something first."""

    def __init__(self, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gateway says of an engine that is to run in a Ray cluster."""

    address: str
    """`host:port` of the cluster, or `local`: one that is started here, and ends with the engine."""
    storage: str
    """The gateway's storage folder, which the node has to have too; empty: it need not, there is a storage_url."""
    python: str = ""
    """Interpreter of the engine process on its node; empty: the one that Ray uses there."""
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    wait_s: float = 30.0
    """Seconds for which a node that has all of this is waited for."""

    @property
    def needed(self) -> dict[str, float]:
        """What a node must have, by Ray's names."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def described(self) -> str:
        """In words, for errors."""
        parts = [f"{name} {amount:g}" for name, amount in self.needed.items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return ", ".join(parts) or "nothing in particular"


class RayPlace(Place):
    """The actor."""

    def node(self) -> str:
        """The id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())


class Found(NamedTuple):
    """A place that has answered."""

    actor: Any
    node_id: str
    introduction: Introduction

    def serve(self, address: str, server_key: bytes, owner_timeout_s: float) -> ray.ObjectRef[int]:
        """Have the engine process started, and relayed for to a listener. What is returned is there when it is over."""
        serving: ray.ObjectRef[int] = self.actor.serve.remote(address, server_key, owner_timeout_s)
        return serving


def require_token() -> None:
    """Ray listens on all interfaces and runs what it is sent: without its token nothing is done. Raises NoPlace."""
    if variable(TOKEN_MODE) != "token":
        raise NoPlace(
            f"Ray is used with token authentication only: set {TOKEN_MODE}=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, for the gateway and for every node; see docs/ray.md"
        )
    file = Path(variable("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not variable("RAY_AUTH_TOKEN") and not (file.is_file() and file.read_bytes().strip()):
        raise NoPlace(
            f"there is no token for Ray: RAY_AUTH_TOKEN is empty, and {file} is no file with one; see docs/ray.md"
        )


def enter(wanted: Wanted) -> None:
    """Become a part of the cluster. Raises NoPlace."""
    options: dict[str, Any] = {"logging_level": "WARNING", "include_dashboard": False}
    if wanted.address == LOCAL:
        amounts = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "resources": dict(wanted.resources)}
        options |= {**amounts, "labels": dict(wanted.labels), "object_store_memory": _OBJECTS_BYTES}
    else:
        _probe(wanted.address)
    try:
        ray.init(address=wanted.address, **options)
    except ConnectionError as error:
        raise NoPlace(
            f"the Ray cluster at {wanted.address} does not let the gateway in: its token is another one, or this "
            f"machine is no node of it ({_first_line(error)}); see docs/ray.md",
            final=False,
        ) from error
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise NoPlace(
            f"Ray cannot be entered at {wanted.address}: {_first_line(error)}", final=False
        ) from error


def find(wanted: Wanted, beat: Callable[[], None]) -> Found:
    """An actor on a node that has what is wanted, which has answered; `beat` is called while it is waited for.
    Raises NoPlace."""
    actor: Any = (
        ray.remote(RayPlace)
        .options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            resources=dict(wanted.resources),
            label_selector=dict(wanted.labels),
            max_restarts=0,
            max_task_retries=0,
        )
        .remote(wanted.python)
    )
    with _mark(wanted.storage) as mark:
        answers = [actor.node.remote(), actor.introduce.remote(mark)]
        deadline = time.monotonic() + wanted.wait_s
        while len(ray.wait(answers, num_returns=2, timeout=_LOOK_S)[0]) < 2:
            beat()
            if time.monotonic() > deadline:
                raise _none_free(wanted)
        try:
            node_id, introduction = ray.get(answers, timeout=_PROBE_S)
        except RayError as error:
            raise _unfit(error, wanted) from error
    _check(introduction, wanted)
    return Found(actor, node_id, introduction)


def _check(place: Introduction, wanted: Wanted) -> None:
    if not place.storage:
        raise NoPlace(
            f"{place.host} does not see the gateway's storage folder {wanted.storage}: engines on other machines read "
            "and write weights there, so it has to be on a file system that all of them have at the same path; or set "
            "storage_url, by which they need none in common"
        )
    if not place.python:
        raise NoPlace(f"its interpreter {wanted.python!r} cannot be run on {place.host}")


def alive(node_id: str) -> bool:
    """Whether the cluster still counts on a node."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def own_ip() -> str:
    """Under which address other nodes reach this one."""
    return str(ray.util.get_node_ip_address())


def until_over(serving: ray.ObjectRef[int]) -> None:
    """Returns when a place does not serve any more, whatever the reason, which is logged."""
    try:
        ray.get(serving)
    except RayError as error:
        log.error("Ray says: %s", _first_line(error))


def leave() -> None:
    """Leave the cluster. The actor is killed by that, and with it an engine process that has not ended."""
    ray.shutdown()


def lacking(nodes: list[dict[str, Any]], wanted: Wanted) -> bool:
    """Whether no node that is alive has all that is wanted, were it free."""
    return not any(
        node["Alive"]
        and all(node["Resources"].get(name, 0.0) >= amount for name, amount in wanted.needed.items())
        and _has_labels(node.get("Labels") or {}, wanted.labels)
        for node in nodes
    )


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def _none_free(wanted: Wanted) -> NoPlace:
    nodes = ray.nodes()
    where = f"the Ray cluster at {wanted.address}"
    if not lacking(nodes, wanted):
        return NoPlace(f"all nodes of {where} that have {wanted.described()} are taken", final=False)
    having = "; ".join(_of_node(node) for node in nodes if node["Alive"])
    return NoPlace(f"no node of {where} has {wanted.described()}; its nodes have: {having}", final=False)


def _of_node(node: Mapping[str, Any]) -> str:
    """What a node has, without what every node has."""
    own = {name: amount for name, amount in node["Resources"].items() if not name.startswith("node:")}
    parts = [f"{name} {own[name]:g}" for name in sorted(own.keys() - {"memory", "object_store_memory"})]
    parts += [f"label {k}={v}" for k, v in (node.get("Labels") or {}).items() if k != "ray.io/node-id"]
    return ", ".join(parts) or "nothing"


def _unfit(error: Exception, wanted: Wanted) -> NoPlace:
    """Why an actor could not begin."""
    text = str(error)
    if "never ran" in text:  # a process that wants tokens does not hear those that have none
        return NoPlace(
            f"the Ray cluster at {wanted.address} has dropped the actor before it ran, as it does when its nodes were "
            f"started without token authentication: start them with {TOKEN_MODE}=token, see docs/ray.md",
            final=False,
        )
    if "ModuleNotFoundError" in text:
        missing = text.partition("ModuleNotFoundError:")[2].strip().splitlines()[0]
        return NoPlace(
            f"the Python that Ray uses on the node lacks what an engine needs ({missing}): install the same version of "
            "Tandem there"
        )
    return NoPlace(f"the actor on the node did not begin: {_first_line(error)}", final=False)


@contextmanager
def _mark(storage: str) -> Iterator[str]:
    """A file in the storage folder, by which a node sees whether it has the same one; no file without a folder."""
    if not storage:
        yield ""
        return
    mark = Path(storage) / f".shared-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)


def _probe(address: str) -> None:
    """Ray itself waits for minutes where nobody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except OSError as error:
        raise NoPlace(
            f"no Ray cluster answers at {address}: {error.strerror or 'it is silent'}", final=False
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
