"""What `EngineConfig.options` may hold for this plugin, with every default in one place."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from engines.interface import LoadError
from engines.misfit import misfit_of


class HfOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the Transformers engine; unknown names and wrong types are refused."""

    device: str = "auto"
    """`auto` takes the first CUDA device if there is one, else the CPU; or a torch device such as `cuda:1`."""
    dtype: str = "auto"
    """Of the frozen base weights: `float32`, `bfloat16`, or `auto` (bfloat16 on CUDA, float32 on the CPU)."""
    threads: int | None = None
    """CPU threads of a pass; all cores that the process may use when not given. Bit-identical numbers need the
    same count."""
    max_rank: int = 128
    max_context: int | None = None
    """Longest sequence in tokens; the model's own limit when not given."""
    pass_tokens: int | None = None
    """Tokens that are packed into one forward and backward pass at most; a longer datum makes a pass of its own.
    When not given, as many as memory holds, up to what keeps the device busy (`engines.hf.budget`)."""
    memory_fraction: float | None = None
    """Part of a GPU's memory that this engine takes at most, so that another one may have the rest; all that is free
    when not given. Not on the CPU."""
    checkpointing: bool = False
    """Keep the inputs of layers alone during a training pass and compute the rest again on its way back: the same
    numbers, for less memory and a third more time. A datum that does not fit otherwise is computed so anyway."""
    sample_slots: int = 48
    """Sequences that are decoded together at most; further ones wait, but for the first one of a party (up to 16)."""
    prefill_tokens: int = 2048
    """Prompt tokens that are taken into the running batch in one step at most; a longer prompt is run in pieces of half
    as many, a piece a step, one such prompt at a time."""
    prompt_cache_mib: int = 256
    """Memory for what later prompts of the same sampler may begin with; the least recently used prompt goes first."""
    cuda_graphs: bool = True
    """On CUDA, record decoding steps that come up again, and launch all kernels of one in a single call."""
    deterministic: bool = False
    """Compute every run's operation and every decoded sequence in passes of their own and ask torch for deterministic
    kernels, so that numbers do not depend, to the last bit, on what else is being trained or sampled."""


def read_options(options: dict[str, Any]) -> HfOptions:
    """The options of a configuration; raises LoadError naming what is unknown, mistyped or out of range."""
    try:
        read = msgspec.convert(options, HfOptions)
    except msgspec.ValidationError as error:
        allowed = ", ".join(HfOptions.__struct_fields__)
        raise LoadError(f"{misfit_of(error, 'options')}; options of the hf engine are {allowed}") from error
    if read.dtype not in ("auto", "float32", "bfloat16"):
        raise LoadError(f"options.dtype is {read.dtype!r}; allowed are auto, float32, bfloat16")
    if read.memory_fraction is not None and not 0 < read.memory_fraction <= 1:
        raise LoadError(
            f"options.memory_fraction is {read.memory_fraction}; it must be above 0 and at most 1"
        )
    for name, value in msgspec.structs.asdict(read).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise LoadError(f"options.{name} is {value}; it must be at least 1")
    return read


def cpu_threads(options: HfOptions) -> int:
    """The number of CPU threads that a pass uses: those of the options, else the cores that this process may run on.

    These can be fewer than the machine has: a container's or `taskset`'s. More threads than cores wait for each other.
    """
    if options.threads is not None:
        return options.threads
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no affinity
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
