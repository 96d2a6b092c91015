"""What `EngineConfig.options` may hold for this plugin, with every default in one place."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from engines.interface import LoadError
from engines.misfit import misfit_of


class VllmOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the vLLM engine; unknown names and wrong types are refused."""

    dtype: str = "auto"
    """Of weights and computation: `float32`, `bfloat16`, or `auto` (bfloat16 on CUDA, float32 on the CPU)."""
    max_rank: int = 64
    """Largest rank of an adapter. vLLM reserves memory for it in every place of `adapters`."""
    max_context: int | None = None
    """Longest sequence in tokens; the model's own limit when not given."""
    adapters: int = 8
    """Adapters that are loaded at a time; the least recently used one makes room, those in use stay."""
    sample_slots: int = 64
    """Sequences that are decoded together at most; further ones wait, but for the first one of a party (up to 16)."""
    prefill_tokens: int = 2048
    """Tokens of prompts and of sequences that one step takes together at most."""
    memory_fraction: float = 0.85
    """Part of a GPU's memory that vLLM takes in all; what trains beside it needs the rest."""
    sleep_after_s: float = 0.0
    """Seconds without a request after which vLLM sleeps: the GPU's memory is free then, and the weights are in main
    memory until the next request, which waits for them. 0: it never sleeps. Not on the CPU."""
    cache_gib: int = 1
    """On the CPU, memory for the cache of keys and values, in GiB."""
    tensor_parallel: int = 1
    """GPUs that share the model."""
    eager: bool = False
    """Whether to leave out compiling and CUDA graphs: slower, and ready sooner. Always so on the CPU."""


def read_options(options: dict[str, Any]) -> VllmOptions:
    """The options of a configuration; raises LoadError naming what is unknown, mistyped or out of range."""
    try:
        read = msgspec.convert(options, VllmOptions)
    except msgspec.ValidationError as error:
        allowed = ", ".join(VllmOptions.__struct_fields__)
        raise LoadError(f"{misfit_of(error, 'options')}; options of the vllm engine are {allowed}") from error
    if read.dtype not in ("auto", "float32", "bfloat16"):
        raise LoadError(f"options.dtype is {read.dtype!r}; allowed are auto, float32, bfloat16")
    if not 0 < read.memory_fraction <= 1:
        raise LoadError(
            f"options.memory_fraction is {read.memory_fraction}; it must be above 0 and at most 1"
        )
    if not 0 <= read.sleep_after_s < math.inf:
        raise LoadError(
            f"options.sleep_after_s is {read.sleep_after_s}; it must be 0, for never, or a number of seconds"
        )
    for name, value in msgspec.structs.asdict(read).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise LoadError(f"options.{name} is {value}; it must be at least 1")
    if read.max_rank not in RANKS:
        raise LoadError(
            f"options.max_rank is {read.max_rank}; vLLM reserves memory for one of {', '.join(map(str, RANKS))}"
        )
    return read


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its largest rank; adapters of any smaller one fit."""
