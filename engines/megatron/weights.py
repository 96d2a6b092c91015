"""From a Hugging Face checkpoint to one rank's weights: which tensors each parameter is made of, and how they are cut.

Only safetensors are read, and of each tensor only what the rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.interface import LoadError

Cut = Literal["rows", "columns", "whole"]
"""Which axis of a tensor the tensor-parallel ranks divide: 0, 1 or none."""


class Source(NamedTuple):
    """A tensor of the checkpoint, and how it is cut."""

    name: str
    cut: Cut


class Parameter(NamedTuple):
    """A parameter of this rank [rows, columns]: the cut tensors one below the other."""

    name: str
    sources: Sequence[Source]


def layer_map(layer: int, local: int, *, head_norms: bool, experts: range) -> Iterator[Parameter]:
    """The parameters of one decoder layer: number `layer` of the checkpoint, `local` of this rank's stage.

    Fused layers keep their parts one below the other: q, k, v, and gate, up, each of them this rank's share. Of
    `experts` the rank holds the matrices, whole and one expert's below the other's.
    """
    theirs, ours = f"model.layers.{layer}", f"decoder.layers.{local}"
    attention = f"{theirs}.self_attn"
    yield _whole(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight")
    yield _whole(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight")
    qkv = [Source(f"{attention}.{part}_proj.weight", "rows") for part in "qkv"]
    yield Parameter(f"{ours}.self_attention.linear_qkv.weight", qkv)
    yield Parameter(
        f"{ours}.self_attention.linear_proj.weight", [Source(f"{attention}.o_proj.weight", "columns")]
    )
    if head_norms:
        yield _whole(f"{ours}.self_attention.q_layernorm.weight", f"{attention}.q_norm.weight")
        yield _whole(f"{ours}.self_attention.k_layernorm.weight", f"{attention}.k_norm.weight")
    if experts:
        yield from _experts_map(f"{theirs}.mlp", f"{ours}.mlp", experts)
        return
    gated = [Source(f"{theirs}.mlp.{part}_proj.weight", "rows") for part in ("gate", "up")]
    yield Parameter(f"{ours}.mlp.linear_fc1.weight", gated)
    yield Parameter(f"{ours}.mlp.linear_fc2.weight", [Source(f"{theirs}.mlp.down_proj.weight", "columns")])


def _experts_map(theirs: str, ours: str, experts: range) -> Iterator[Parameter]:
    yield _whole(f"{ours}.router", f"{theirs}.gate.weight")
    for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
        sources = [
            Source(f"{theirs}.experts.{number}.{part}_proj.weight", "whole")
            for number in experts
            for part in parts
        ]
        yield Parameter(f"{ours}.{name}", sources)


def stage_map(
    first_layer: int,
    layers: int,
    *,
    head_norms: bool,
    experts: range,
    is_first: bool,
    is_last: bool,
    tied: bool,
) -> Iterator[Parameter]:
    """The parameters of a pipeline stage."""
    if is_first:
        name = "embedding.word_embeddings.weight"
        yield Parameter(name, [Source("model.embed_tokens.weight", "rows")])
    for local in range(layers):
        yield from layer_map(first_layer + local, local, head_norms=head_norms, experts=experts)
    if is_last:
        yield _whole("decoder.final_layernorm.weight", "model.norm.weight")
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        yield Parameter("output_layer.weight", [Source(head, "rows")])


def _whole(name: str, source: str) -> Parameter:
    return Parameter(name, [Source(source, "whole")])


class Checkpoint:
    """The safetensors of a model's folder, opened while the block lasts."""

    def __init__(self, folder: Path, shard: int, shards: int) -> None:
        self._folder = folder
        self._shard = shard
        self._shards = shards
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._where = _index(folder)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, parameter: Parameter) -> Tensor:
        """This rank's part of a parameter. Raises LoadError when the checkpoint lacks it or cannot be read."""
        try:
            parts = [self._cut(source) for source in parameter.sources]
        except (OSError, SafetensorError) as error:
            raise LoadError(f"the model {self._folder} cannot be read: {error}") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _cut(self, source: Source) -> Tensor:
        if source.name not in self._where:
            raise LoadError(f"the model {self._folder} holds no {source.name}")
        stored = self._file(self._where[source.name]).get_slice(source.name)
        if source.cut == "whole":
            whole: Tensor = stored[:]
            return whole
        axis = 0 if source.cut == "rows" else 1
        size = stored.get_shape()[axis] // self._shards
        own = slice(self._shard * size, (self._shard + 1) * size)
        part: Tensor = stored[own] if axis == 0 else stored[:, own]
        return part

    def _file(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(str(self._folder / name), framework="pt")
            self._files[name] = self._open.enter_context(opened)
        return self._files[name]


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    listed = folder / "model.safetensors.index.json"
    try:
        if listed.is_file():
            return _Index(**msgspec.json.decode(listed.read_bytes())).weight_map
        with safe_open(str(folder / "model.safetensors"), framework="pt") as single:
            return dict.fromkeys(single.keys(), "model.safetensors")
    except (OSError, SafetensorError, msgspec.DecodeError, TypeError) as error:
        raise LoadError(f"the model {folder} has no safetensors that can be read: {error}") from error


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}
