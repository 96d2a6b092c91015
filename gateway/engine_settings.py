"""The setting `engines`: one entry for each engine, or for each kind of which there are replicas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from gateway.errors import ConfigurationError
from gateway.ray_place import Placed, RayPlace, check_ray
from gateway.replica_bounds import ReplicaBounds, problem_of

_SAMPLING_SHARES = (0.05, 0.95)
BUILT_IN = "tandem/tiny"
"""The base model that comes with Tandem."""
_BUILT_IN_FOLDER = str(Path(__file__).parents[1] / "engines" / "tiny" / "model")


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine process."""

    name: str
    """Its name in logs and in the admin API; unique."""
    base_model: str
    """The name under which its model is served, for example `Qwen/Qwen3-8B`."""
    model: str = ""
    """Hugging Face name or local folder of the weights; empty: `base_model`, or what is built in."""
    plugin: str = "hf"
    """Entry point of the group `tandem.engines`, looked up in the engine's own interpreter."""
    roles: tuple[Literal["train", "sample"], ...] = ("train", "sample")
    """What it is used for."""
    replicas: int | ReplicaBounds = 1
    """How many engines there are of this kind, or bounds between which it follows what there is to do; more than one
    only of engines that do nothing but sample."""
    devices: tuple[str, ...] = ()
    """`CUDA_VISIBLE_DEVICES` of each replica, in order, for all that there may be; empty: all see what the gateway
    sees."""
    python: str = sys.executable
    """Interpreter of the engine process, for plugins whose packages clash with the gateway's."""
    options: dict[str, Any] = {}
    """The plugin's own settings."""
    ray: RayPlace | None = None
    """Where in a Ray cluster it runs; not given: on this machine."""
    run_memory_bytes: int | None = None
    """Memory for runs; if there are more, they take turns. Not given: 40 % of what is free when its model is loaded."""
    adapter_memory_bytes: int | None = None
    """Memory for sampled adapters; others are read again. Not given: 10 % of what is free when its model is loaded."""
    sampling_share: float = 0.5
    """Part of its time that it samples while there is also training to do; either has all of it while it is alone."""

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return self.model or (_BUILT_IN_FOLDER if self.base_model == BUILT_IN else self.base_model)

    @property
    def bounds(self) -> ReplicaBounds:
        """Of the number of its replicas."""
        if isinstance(self.replicas, int):
            return ReplicaBounds(self.replicas, self.replicas)
        return self.replicas

    def replica(self, number: int) -> EngineSettings:
        """Its n-th replica by itself, from 1 on; the first one has its name."""
        name = self.name if number == 1 else f"{self.name}-{number}"
        devices = self.devices[number - 1 : number]
        return msgspec.structs.replace(self, name=name, replicas=1, devices=devices)


def check_engines(engines: tuple[EngineSettings, ...]) -> None:
    """What types cannot say of them. Raises ConfigurationError."""
    names = [engine.name for engine in engines]
    if not names:
        raise ConfigurationError("engines is empty; at least one engine is needed")
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"engines: the name {name!r} stands twice; names are unique")
    for engine in engines:
        for setting in ("run_memory_bytes", "adapter_memory_bytes"):
            size = getattr(engine, setting)
            if size is not None and size < 1:
                raise ConfigurationError(
                    f"engines: {setting} of {engine.name!r} is {size}; it must be at least 1"
                )
        low, high = _SAMPLING_SHARES
        if not low <= engine.sampling_share <= high:
            raise ConfigurationError(
                f"engines: sampling_share of {engine.name!r} is {engine.sampling_share}; it must be from {low} to "
                f"{high}"
            )
        _check_replicas(engine, names)
    check_ray([Placed(e.name, e.ray, e.bounds.max, e.devices) for e in engines if e.ray is not None])


def _check_replicas(engine: EngineSettings, names: list[str]) -> None:
    taken = [name for n in range(2, engine.bounds.max + 1) if (name := engine.replica(n).name) in names]
    problem = problem_of(engine.bounds, engine.devices, trains="train" in engine.roles)
    if problem is None and taken:
        problem = f"one would be called {taken[0]!r}, as another engine is"
    if problem is not None:
        raise ConfigurationError(f"engines: replicas of {engine.name!r}: {problem}")
