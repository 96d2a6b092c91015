"""Finding a place in a Ray cluster: who may, where it is, what it must have; each obstacle is one sentence."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ray
from ray.exceptions import RayError
from ray.util import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    plugin: str = ""
    """The engine's."""
    ranks: int = 1
    """Processes of the engine, each of which is to have all of this, on one node or on several."""

    @property
    def needed(self) -> dict[str, float]:
        """What a node must have for each rank, by Ray's names."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def described(self) -> str:
        """In words, for errors."""
        parts = [f"{name} {amount:g}" for name, amount in self.needed.items()]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        each = ", ".join(parts) or "nothing in particular"
        return each if self.ranks == 1 else f"{self.ranks} ranks with {each} each"


class RayPlace(Place):
    """The actor."""

    def __init__(self, python: str, ranks: int = 1) -> None:
        super().__init__(python, ranks, own_ip())

    def node(self) -> str:
        """The id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())


class Rank(NamedTuple):
    """A place of one rank, which has answered."""

    actor: Any
    node_id: str
    introduction: Introduction


class Found(NamedTuple):
    """The places of an engine, by rank: one, if nothing else is said."""

    ranks: list[Rank]
    plugin: str

    @property
    def introduction(self) -> Introduction:
        """Rank 0's, which speaks for the engine."""
        return self.ranks[0].introduction

    def described(self) -> str:
        """Where it is, by node and machine."""
        return ", ".join(f"{rank.node_id} ({rank.introduction.host})" for rank in self.ranks)

    def serve(self, address: str, server_key: bytes, owner_timeout_s: float) -> list[ray.ObjectRef[int]]:
        """Have the engine's processes started, and rank 0 relayed for to a listener. What is returned, the exit status
        of each rank, is there when it is over with that one."""
        first, *others = self.ranks
        serving = [first.actor.serve.remote(address, server_key, owner_timeout_s)]
        for rank, other in enumerate(others, 1):
            meeting = first.introduction.meeting
            serving.append(other.actor.follow.remote(self.plugin, meeting, rank, len(self.ranks)))
        return serving

    def nodes_alive(self) -> bool:
        """Whether the cluster still counts on all nodes."""
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return all(rank.node_id in there for rank in self.ranks)


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
        options |= {"num_cpus": wanted.cpus * wanted.ranks, "num_gpus": wanted.gpus * wanted.ranks}
        options["resources"] = {name: amount * wanted.ranks for name, amount in wanted.resources.items()}
        options |= {"labels": dict(wanted.labels), "object_store_memory": _OBJECTS_BYTES}
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
    """Actors on nodes that have what is wanted, one for each rank, which have answered; `beat` is called while they are
    waited for. Raises NoPlace."""
    actors = _actors(wanted)
    with _mark(wanted.storage) as mark:
        nodes = [actor.node.remote() for actor in actors]
        answers = [actor.introduce.remote(mark) for actor in actors]
        asked = [*nodes, *answers]
        deadline = time.monotonic() + wanted.wait_s
        while len(ray.wait(asked, num_returns=len(asked), timeout=_LOOK_S)[0]) < len(asked):
            beat()
            if time.monotonic() > deadline:
                raise _none_free(wanted)
        try:
            told = zip(
                actors, ray.get(nodes, timeout=_PROBE_S), ray.get(answers, timeout=_PROBE_S), strict=True
            )
        except RayError as error:
            raise _unfit(error, wanted) from error
    ranks = neighbours([Rank(*each) for each in told])
    for rank in ranks:
        _check(rank.introduction, wanted)
    return Found(ranks, wanted.plugin)


def neighbours(ranks: list[Rank]) -> list[Rank]:
    """In an order in which those on one node have numbers in a row, as tensor ranks have, which speak the most. The
    first one stays."""
    first, *others = ranks
    return [first, *sorted(others, key=lambda rank: (rank.node_id != first.node_id, rank.node_id))]


def _actors(wanted: Wanted) -> list[Any]:
    """One for each rank, rank 0's first; several together or not at all, on as few nodes as may be."""
    options = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "resources": dict(wanted.resources)}
    options |= {"max_restarts": 0, "max_task_retries": 0}
    if wanted.ranks == 1:
        placed = ray.remote(RayPlace).options(**options, label_selector=dict(wanted.labels))
        return [placed.remote(wanted.python)]
    group = placement_group(
        [wanted.needed] * wanted.ranks,
        strategy="PACK",
        bundle_label_selector=[dict(wanted.labels)] * wanted.ranks,
    )
    return [
        ray.remote(RayPlace)
        .options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank))
        .remote(wanted.python, 1 if rank else wanted.ranks)
        for rank in range(wanted.ranks)
    ]


def _check(place: Introduction, wanted: Wanted) -> None:
    if not place.storage:
        raise NoPlace(
            f"{place.host} does not see the gateway's storage folder {wanted.storage}: engines on other machines read "
            "and write weights there, so it has to be on a file system that all of them have at the same path; or set "
            "storage_url, by which they need none in common"
        )
    if not place.python:
        raise NoPlace(f"its interpreter {wanted.python!r} cannot be run on {place.host}")


def own_ip() -> str:
    """Under which address other nodes reach this one."""
    return str(ray.util.get_node_ip_address())


def until_over(serving: Sequence[ray.ObjectRef[int]]) -> None:
    """Returns when it is over with rank 0, or with another rank that had not done its work; the reason is logged. Those
    that end well have been told to by rank 0, which is about to end too."""
    left = list(serving)
    while serving[0] in left:
        [ended], left = ray.wait(left, num_returns=1)
        rank = serving.index(ended)
        try:
            status = ray.get(ended)
        except RayError as error:
            log.error("Ray says: %s", _first_line(error))
            return
        if rank and status:
            log.error("rank %d has ended with status %d; the others cannot go on without it", rank, status)
            return


def leave() -> None:
    """Leave the cluster. The actor is killed by that, and with it an engine process that has not ended."""
    ray.shutdown()


def room(nodes: list[dict[str, Any]], wanted: Wanted) -> int:
    """How many ranks the nodes that are alive have room for, were all of it free; no more than are wanted."""
    found = 0
    for node in nodes:
        if node["Alive"] and _has_labels(node.get("Labels") or {}, wanted.labels):
            shares = [node["Resources"].get(name, 0.0) // amount for name, amount in wanted.needed.items()]
            found += int(min(shares, default=wanted.ranks))
    return min(found, wanted.ranks)


def _has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def _none_free(wanted: Wanted) -> NoPlace:
    nodes = ray.nodes()
    where = f"the Ray cluster at {wanted.address}"
    here = room(nodes, wanted)
    if here == wanted.ranks:
        return NoPlace(f"all nodes of {where} that have {wanted.described()} are taken", final=False)
    having = "; ".join(_of_node(node) for node in nodes if node["Alive"])
    if wanted.ranks > 1:
        return NoPlace(
            f"{where} has room for {here} of {wanted.described()}; its nodes have: {having}", final=False
        )
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
