"""From an engine's options and the devices that are at hand to the layout that it runs under."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import msgspec
import torch

from engines.interface import LoadError, Meeting
from engines.megatron.constraints import Layout
from engines.megatron.costs import Workload
from engines.megatron.layout import GIB, Asked, propose
from engines.megatron.options import MegatronOptions, width_of
from engines.megatron.shapes import ModelShape


class Plan(NamedTuple):
    """Every part of the layout, by the names of the options; the device of each rank; and why it is this layout."""

    parts: dict[str, Any]
    devices: list[torch.device]
    reason: str

    def decided(self, options: MegatronOptions) -> MegatronOptions:
        """The options with nothing left open."""
        return msgspec.structs.replace(options, **self.parts)


def plan(options: MegatronOptions, shape: ModelShape, meeting: Meeting | None = None) -> Plan:
    """What was set stays; the rest is what the command `engines.megatron.layout` proposes for the same devices. With a
    `meeting` the ranks are those that wait there, each of which sees one device.

    Raises LoadError that names the constraint which fails, or the devices or the memory that are lacking.
    """
    asked = Asked(**{name: getattr(options, name) for name in Asked.__struct_fields__})
    kind = device_kind(options)
    count = _count(options, asked, kind) if meeting is None else _waiting(options, meeting)
    load = Workload(tokens=options.pass_tokens, weight_bytes=width_of(options, kind))
    here = count if meeting is None else 1
    found = propose(shape, count, _memory_bytes(options, kind, here), asked, load)
    parts = {name: getattr(found.layout, name) for name in Layout.__struct_fields__}
    devices = [
        torch.device(kind, number % here) if kind == "cuda" else torch.device(kind) for number in range(count)
    ]
    return Plan({**parts, "recompute": found.recompute}, devices, found.reason)


def _waiting(options: MegatronOptions, meeting: Meeting) -> int:
    """Ranks that were started elsewhere."""
    if options.devices not in (None, meeting.ranks):
        raise LoadError(
            f"options.devices is {options.devices}, and ray.ranks is {meeting.ranks}: leave options.devices out"
        )
    return meeting.ranks


def device_kind(options: MegatronOptions) -> str:
    """`cuda` or `cpu`."""
    if options.device == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    return options.device


def _count(options: MegatronOptions, asked: Asked, kind: str) -> int:
    """Ranks. Of CUDA devices all there are, unless fewer are to be used; processors are as many as are asked for."""
    if kind == "cpu":
        parts = (asked.tensor, asked.pipeline, asked.data, asked.context)
        return options.devices or math.prod(part or 1 for part in parts)
    there = torch.cuda.device_count()
    count = options.devices or max(1, there)
    if count > there:
        raise LoadError(f"{count} CUDA devices are wanted (options.devices), this machine has {there}")
    return count


def _memory_bytes(options: MegatronOptions, kind: str, count: int) -> int:
    """Of one device: its own, the smallest one's where they differ; of main memory a rank's share. All of it, and not
    what happens to be free, so that a start leads to the same layout as the one before."""
    if options.device_memory_gib is not None:
        return int(options.device_memory_gib * GIB)
    if kind == "cuda":
        return min(int(torch.cuda.get_device_properties(number).total_memory) for number in range(count))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
