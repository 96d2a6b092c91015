"""What `EngineConfig.options` may hold for this plugin, with every default in one place."""

from __future__ import annotations

from typing import Any

import msgspec

from engines.interface import LoadError
from engines.megatron.constraints import Layout


class MegatronOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the Megatron engine; unknown names and wrong types are refused."""

    tensor: int = 1
    """Ranks that share each layer: heads, the MLP's inner width and the vocabulary are divided among them."""
    pipeline: int = 1
    """Stages, each of which holds as many layers as the others."""
    data: int = 1
    """Copies of the model, among which the data of a call are divided. There are tensor x pipeline x data x context
    ranks."""
    context: int = 1
    """Ranks that share each sequence: of a pass each holds a part of the tokens."""
    expert: int = 1
    """Ranks that share the experts of each layer, among those of a stage (tensor x data x context)."""
    sequence: bool = False
    """Sequence parallelism: tensor ranks share what a layer does between its matrices, too."""
    recompute: bool = False
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

    @property
    def layout(self) -> Layout:
        """How the model is cut."""
        return Layout(
            tensor=self.tensor,
            pipeline=self.pipeline,
            data=self.data,
            context=self.context,
            expert=self.expert,
            sequence=self.sequence,
        )


def read_options(options: dict[str, Any]) -> MegatronOptions:
    """The options of a configuration; raises LoadError naming what is unknown, mistyped or out of range."""
    try:
        read = msgspec.convert(options, MegatronOptions)
    except msgspec.ValidationError as error:
        allowed = ", ".join(MegatronOptions.__struct_fields__)
        raise LoadError(f"options of the megatron engine: {error}; allowed are {allowed}") from error
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
    if not 1 <= read.rank_timeout_s <= 3600:
        raise LoadError(
            f"options.rank_timeout_s is {read.rank_timeout_s:g}; it must be from 1 to 3600 seconds"
        )
    return read
