"""What `EngineConfig.options` may hold for this plugin, with every default in one place."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from engines.interface import LoadError
from engines.megatron.constraints import Layout
from engines.misfit import misfit_of


class MegatronOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the Megatron engine; unknown names and wrong types are refused."""

    devices: int | None = None
    """Devices to run on, a rank on each; all CUDA devices there are when not given."""
    device_memory_gib: float | None = None
    """Memory of each that the layout is chosen for; what the device has when not given."""
    tensor: int | None = None
    """Ranks that share each layer: heads, the MLP's inner width and the vocabulary are divided among them. This and the
    parts up to `recompute` are chosen (`engines.megatron.layout`) where they are not given."""
    pipeline: int | None = None
    """Stages, each of which holds as many layers as the others."""
    data: int | None = None
    """Copies of the model, among which the data of a call are divided. There are tensor x pipeline x data x context
    ranks."""
    context: int | None = None
    """Ranks that share each sequence: of a pass each holds a part of the tokens."""
    expert: int | None = None
    """Ranks that share the experts of each layer, among those of a stage (tensor x data x context)."""
    sequence: bool | None = None
    """Sequence parallelism: tensor ranks share what a layer does between its matrices, too."""
    recompute: bool | None = None
    """Keep the inputs of layers alone during a training pass and compute the rest again on its way back: the same
    numbers, for less memory and a third more time."""
    device: str = "auto"
    """`cuda` gives rank r the r-th CUDA device, `cpu` computes on processors; `auto` is `cuda` where there is one."""
    dtype: str = "auto"
    """Of the frozen base weights: `float32`, `bfloat16`, or `auto` (bfloat16 on CUDA, float32 on the CPU)."""
    threads: int = 1
    """CPU threads of each rank. Bit-identical numbers need the same count."""
    max_rank: int = 128
    max_context: int | None = None
    """Longest sequence in tokens; the model's own limit when not given."""
    pass_tokens: int = 4096
    """Tokens that are packed into one micro-batch at most; a longer datum makes one of its own."""
    deterministic: bool = False
    """Compute every run's operation in micro-batches of their own, so that numbers do not depend, to the last bit, on
    what else is being trained."""
    rank_timeout_s: float = 30.0
    """How long a rank waits for another one in the middle of a call. Longer waiting means that one hangs: all end, and
    the gateway builds the runs anew from their logs. It must exceed what one micro-batch takes on one rank."""
    start_timeout_s: float = 600.0
    """How long the ranks wait for each other to start, and to load the model. If one takes longer the start has failed,
    and is tried again."""

    @property
    def layout(self) -> Layout:
        """How the model is cut; what is not given counts as not cut."""
        return Layout(
            tensor=self.tensor or 1,
            pipeline=self.pipeline or 1,
            data=self.data or 1,
            context=self.context or 1,
            expert=self.expert or 1,
            sequence=bool(self.sequence),
        )


def read_options(options: dict[str, Any]) -> MegatronOptions:
    """The options of a configuration; raises LoadError naming what is unknown, mistyped or out of range."""
    try:
        read = msgspec.convert(options, MegatronOptions)
    except msgspec.ValidationError as error:
        allowed = ", ".join(MegatronOptions.__struct_fields__)
        raise LoadError(
            f"{misfit_of(error, 'options')}; options of the megatron engine are {allowed}"
        ) from error
    for name, allowed_names in (
        ("dtype", ("auto", "float32", "bfloat16")),
        ("device", ("auto", "cpu", "cuda")),
    ):
        if getattr(read, name) not in allowed_names:
            raise LoadError(
                f"options.{name} is {getattr(read, name)!r}; allowed are {', '.join(allowed_names)}"
            )
    for name, value in msgspec.structs.asdict(read).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise LoadError(f"options.{name} is {value}; it must be at least 1")
    if read.device_memory_gib is not None and not 0 < read.device_memory_gib < math.inf:
        raise LoadError(f"options.device_memory_gib is {read.device_memory_gib:g}; it must be above 0")
    for name, most in (("rank_timeout_s", 3600), ("start_timeout_s", 86400)):
        bound = getattr(read, name)
        if not 1 <= bound <= most:
            raise LoadError(f"options.{name} is {bound:g}; it must be from 1 to {most} seconds")
    return read


def dtype_name(options: MegatronOptions, kind: str) -> str:
    """`float32` or `bfloat16`: of the frozen weights on devices of a kind, `cuda` or `cpu`."""
    if options.dtype == "auto":
        return "bfloat16" if kind == "cuda" else "float32"
    return options.dtype


def width_of(options: MegatronOptions, kind: str) -> int:
    """Bytes of each of them."""
    return 2 if dtype_name(options, kind) == "bfloat16" else 4
