"""How many ranks a model is cut over in which way, and what makes a way of cutting impossible."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engines.interface import LoadError
from engines.megatron.shapes import ModelShape


class Layout(msgspec.Struct, frozen=True):
    """A number of ranks for each kind of parallelism.

    `tensor` × `pipeline` × `data` × `context` ranks take part. The experts of a layer are spread over `expert` of the
    `tensor` × `data` × `context` ranks of a pipeline stage and are whole there (no tensor parallelism inside an
    expert). `sequence`: what a layer does between its matrices is spread over the tensor parallel ranks too.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def stage_ranks(self) -> int:
        """Ranks that share the layers of one pipeline stage."""
        return self.tensor * self.data * self.context

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in DEGREES}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.sequence:
            parts.append("sequence parallel")
        return ", ".join(parts) or "one rank"


DEGREES = ("tensor", "pipeline", "data", "context", "expert")


def refuse_impossible(shape: ModelShape, layout: Layout, devices: int) -> None:
    """Raises LoadError with the first constraint that fails: field, what came, what is allowed."""
    for sentence in failures(shape, layout, devices):
        raise LoadError(sentence)


def possible(shape: ModelShape, layout: Layout, devices: int) -> bool:
    """Whether the model can be cut so, whatever memory says."""
    return next(failures(shape, layout, devices), None) is None


def failures(shape: ModelShape, layout: Layout, devices: int) -> Iterator[str]:
    """A sentence for each constraint that does not hold."""
    if min(getattr(layout, name) for name in DEGREES) < 1:
        name = next(name for name in DEGREES if getattr(layout, name) < 1)
        yield f"options.{name} is {getattr(layout, name)}; it must be at least 1"
        return
    for what, amount, name in _divided(shape):
        size = getattr(layout, name)
        if amount % size:
            yield (
                f"options.{name} is {size}, which does not divide the model's {amount} {what}; "
                f"up to {devices} it may be {_choices(shape, name, devices)}"
            )
    yield from _expert_failures(shape, layout)
    if layout.sequence and layout.tensor == 1:
        yield "options.sequence spreads work over tensor parallel ranks, but options.tensor is 1; turn it off"
    if layout.ranks != devices:
        yield (
            f"tensor {layout.tensor} × pipeline {layout.pipeline} × data {layout.data} × context {layout.context} are "
            f"{layout.ranks} ranks, but there are {devices} devices; the product must be {devices}"
        )


def _divided(shape: ModelShape) -> Iterator[tuple[str, int, str]]:
    """What of the model is dealt out in equal parts: its name, how many there are, and over which ranks."""
    yield "attention heads", shape.heads, "tensor"
    yield "key and value heads", shape.kv_heads, "tensor"
    yield "tokens of vocabulary", shape.vocabulary, "tensor"
    if not shape.experts:
        yield "columns of the feed-forward part", shape.ffn, "tensor"
    yield "layers", shape.layers, "pipeline"
    if shape.experts:
        yield "experts", shape.experts, "expert"


def divisors(shape: ModelShape, name: str, most: int) -> list[int]:
    """Sizes of one kind of parallelism, up to `most`, that divide everything which is dealt out over it."""
    amounts = [amount for _, amount, over in _divided(shape) if over == name]
    return [size for size in range(1, most + 1) if all(amount % size == 0 for amount in amounts)]


def _choices(shape: ModelShape, name: str, devices: int) -> str:
    return ", ".join(str(size) for size in divisors(shape, name, devices))


def _expert_failures(shape: ModelShape, layout: Layout) -> Iterator[str]:
    if not shape.experts:
        if layout.expert > 1:
            yield f"options.expert is {layout.expert}, but the model has no experts; it must be 1"
        return
    if layout.stage_ranks % layout.expert:
        yield (
            f"options.expert is {layout.expert}, which does not divide the {layout.stage_ranks} ranks of a pipeline "
            f"stage (tensor {layout.tensor} × data {layout.data} × context {layout.context})"
        )
    if layout.tensor > 1 and not layout.sequence:
        yield (
            "options.sequence is false, but a model with experts needs it where options.tensor is above 1 "
            "(Megatron computes no such training pass); turn it on"
        )
