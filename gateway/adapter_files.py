"""Adapters as people bring them: PEFT's two files, checked, and written again as this server's engines read them.

The format of the weights is safetensors (https://huggingface.co/docs/safetensors): eight bytes with the length of a
header, the header in JSON (name → dtype, shape, place), the numbers. It is read here with numpy alone, for the gateway
loads no machine learning library; nothing else than numbers can be in such a file. Pickled weights are refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, part_of, peft_config, peft_key
from engines.interface import EngineInfo, UserError
from engines.operations import LoraSpec

_LARGEST_HEADER = 32 << 20
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ECHO = 120

_SAYS_NOTHING = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "target_modules", "task_type",
    }
)  # fmt: skip
"""Fields that tell where an adapter comes from or how it was trained; which layers it has, the weights tell."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Initialisations that leave the base model as it is. Others move a part of its weights into the adapter."""


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a safetensors file by name; their numbers stay on disk until they are asked for."""

    path: Path
    start: int
    tensors: Mapping[str, _Tensor]

    @classmethod
    def open(cls, path: Path) -> Weights:
        """Raises UserError unless header and numbers fill the file exactly."""
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _LARGEST_HEADER):
                raise _broken("it does not begin with the length of a header")
            header = file.read(length)
        try:
            tensors = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            tensors.pop("__metadata__", None)
            parsed = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in tensors.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _broken(f"its header cannot be read: {str(error)[:_ECHO]}") from error
        _check_places(parsed, size - 8 - length)
        return cls(path, 8 + length, parsed)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> NDArray[np.float32]:
        """The numbers of one tensor, exactly, as float32. Raises UserError when some are not finite."""
        tensor = self.tensors[name]
        begin, end = tensor.data_offsets
        count = (end - begin) // _BYTES[tensor.dtype]
        dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
        raw = np.fromfile(self.path, dtype, count, offset=self.start + begin)
        if tensor.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype("<u4") << np.uint32(16)).view("<f4")
        numbers = raw.astype(np.float32).reshape(tensor.shape)
        if not np.isfinite(numbers).all():
            raise UserError(f"{ADAPTER_WEIGHTS}: {name[:_ECHO]} holds numbers that are not finite")
        return numbers


def _check_places(tensors: Mapping[str, _Tensor], size: int) -> None:
    """Tensors follow one another from the first byte to the last, as the format asks."""
    if not tensors:
        raise UserError(f"{ADAPTER_WEIGHTS} holds no tensors")
    place = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if tensor.dtype not in _BYTES:
            raise UserError(
                f"{ADAPTER_WEIGHTS}: {name[:_ECHO]} is {tensor.dtype[:20]}; allowed are {', '.join(_BYTES)}"
            )
        begin, end = tensor.data_offsets
        wanted = math.prod(tensor.shape) * _BYTES[tensor.dtype]
        if begin != place or min(tensor.shape, default=0) < 0 or end - begin != wanted:
            raise _broken(f"the place of {name[:_ECHO]} does not fit its shape or its neighbours")
        place = end
    if place != size:
        raise _broken(f"its tensors take {place} bytes, it has {size}")


def _broken(why: str) -> UserError:
    return UserError(f"{ADAPTER_WEIGHTS} is no safetensors file: {why}")


# ---------------------------------------------------------------------------- configuration


def read_config(body: bytes) -> tuple[int, float]:
    """Rank and alpha of an `adapter_config.json`.

    The adapter adds (alpha / rank) B A; whatever would make it another one is refused by name with UserError.
    """
    try:
        config = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{ADAPTER_CONFIG} cannot be read: {str(error)[:_ECHO]}") from error
    if config.pop("peft_type", None) != "LORA":
        raise UserError(f"{ADAPTER_CONFIG}: peft_type must be LORA")
    rank, alpha = config.pop("r", None), config.pop("lora_alpha", None)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{ADAPTER_CONFIG}: r is {_shown(rank)}; it must be a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise UserError(f"{ADAPTER_CONFIG}: lora_alpha is {_shown(alpha)}; it must be a number above 0")
    if config.pop("bias", "none") != "none":
        raise UserError(f"{ADAPTER_CONFIG}: bias must be none; adapters here train no biases")
    start = config.pop("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{ADAPTER_CONFIG}: init_lora_weights is {_shown(start)}, which changes the base model's own weights; "
            "convert the adapter with PEFT to one for the unchanged model"
        )
    for name, value in config.items():
        if value and name not in _SAYS_NOTHING:
            raise UserError(
                f"{ADAPTER_CONFIG}: {name[:_ECHO]} is {_shown(value)}; adapters here are plain LoRA, without it"
            )
    return rank, float(alpha)


def _shown(value: object) -> str:
    return repr(value)[:_ECHO]


# ---------------------------------------------------------------------------- both together


@dataclass(frozen=True, slots=True)
class Imported:
    """What has been written: its configuration, and how many layers are there only as zeros."""

    lora: LoraSpec
    size_bytes: int
    layers: int
    zero_layers: int


def rewrite_adapter(source: Path, target: Path, info: EngineInfo) -> Imported:
    """Check the two files in `source` against a base model and write them into `target` as engines read them.

    Engines attach an adapter to all layers of a part (attention, MLP, unembedding) or to none. Layers of a part that
    the adapter does not have are written as zeros: A and B both zero add nothing, and their gradients are zero for
    ever, so sampling and training are those of the adapter as it came. Raises UserError.
    """
    rank, alpha = read_config((source / ADAPTER_CONFIG).read_bytes())
    if rank > info.max_rank:
        raise UserError(f"{ADAPTER_CONFIG}: r is {rank}; the engine takes at most {info.max_rank}")
    weights = Weights.open(source / ADAPTER_WEIGHTS)
    present = _layers_of(weights, rank, info)
    parts = {part_of(layer) for layer in present}
    if "unembed" in parts and not info.train_unembed:
        raise UserError(f"the engine of {info.base_model} takes no adapters on the unembedding")
    lora = LoraSpec(rank, 0, alpha, "attn" in parts, "mlp" in parts, "unembed" in parts)
    layers = {name: shape for name, shape in info.layers.items() if part_of(name) in parts}
    config = peft_config(lora, info.base_model, layers)
    (target / ADAPTER_CONFIG).write_bytes(config)
    written = _write(target / ADAPTER_WEIGHTS, weights, _factors(layers, rank))
    return Imported(lora, written + len(config), len(layers), len(layers) - len(present))


class _Factor(NamedTuple):
    layer: str
    shape: tuple[int, int]


def _factors(layers: Mapping[str, tuple[int, int]], rank: int) -> dict[str, _Factor]:
    """The factors of an adapter on all these layers by PEFT's names: A is [rank, in], B [out, rank]."""
    factors: dict[str, _Factor] = {}
    for layer, (inner, outer) in layers.items():
        factors[peft_key(layer, "A")] = _Factor(layer, (rank, inner))
        factors[peft_key(layer, "B")] = _Factor(layer, (outer, rank))
    return factors


def _layers_of(weights: Weights, rank: int, info: EngineInfo) -> set[str]:
    """The layers that the adapter has, each with both factors of the base model's shapes. Raises UserError."""
    known = _factors(info.layers, rank)
    for name in weights.tensors:
        if name not in known:
            raise UserError(
                f"{ADAPTER_WEIGHTS}: {name[:_ECHO]} is no LoRA factor of a layer of {info.base_model}; one is "
                f"{next(iter(known))}"
            )
        if weights.shape(name) != known[name].shape:
            raise UserError(
                f"{ADAPTER_WEIGHTS}: {name} has shape {list(weights.shape(name))}; {info.base_model} with rank {rank} "
                f"needs {list(known[name].shape)}"
            )
    present = {known[name].layer for name in weights.tensors}
    missing = {name for name, factor in known.items() if factor.layer in present} - weights.tensors.keys()
    if missing:
        raise UserError(f"{ADAPTER_WEIGHTS}: {min(missing)} is missing; a layer has A and B")
    return present


def _write(path: Path, weights: Weights, factors: Mapping[str, _Factor]) -> int:
    """All factors as float32, one in memory at a time; gives the bytes written."""
    with path.open("wb") as file:
        file.write(_header(factors))
        for name, factor in factors.items():
            numbers = weights.read(name) if name in weights.tensors else np.zeros(factor.shape, np.float32)
            file.write(numbers.astype("<f4").tobytes())
        return file.tell()


def _header(factors: Mapping[str, _Factor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, factor in factors.items():
        end = place + 4 * math.prod(factor.shape)
        entries[name] = {"dtype": "F32", "shape": list(factor.shape), "data_offsets": [place, end]}
        place = end
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body
