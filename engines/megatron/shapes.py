"""What Hugging Face's config.json says about a model, as far as it concerns how the model is cut into parts.

Only what the engine computes exactly as Transformers does is taken; everything else in a configuration that would
change a number is refused by its name. Imports no torch, so that a layout can be asked for anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from engines.interface import LoadError
from engines.misfit import misfit_of

Family = Literal["qwen3", "llama", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("qwen3", "llama", "qwen3_moe")
"""`model_type` of the architectures that can be cut."""

CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**20


class Llama3Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """How Llama 3.1 and its successors stretch the longer wavelengths of their positions."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelShape(msgspec.Struct, frozen=True):
    """Sizes of a decoder-only model: `layers` times attention and a gated feed-forward part, RMS norms before both."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner width of the feed-forward part; of one expert's where there are experts."""
    vocabulary: int
    tied: bool
    """Whether the unembedding is the embedding."""
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    experts: int = 0
    """Of each layer; 0 where the feed-forward part is a single one."""
    experts_per_token: int = 0
    normalize_expert_weights: bool = False
    """Whether the weights of a token's experts are made to sum to one."""

    @property
    def qk_norm(self) -> bool:
        """Whether every head's query and key go through a norm of their own."""
        return self.family != "llama"

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim


_HEADS_BY_DEFAULT: dict[Family, tuple[int | None, int | None]] = {
    "qwen3": (32, 128),
    "llama": (None, None),
    "qwen3_moe": (4, None),
}
"""Key and value heads, and the width of a head, that Transformers takes where a configuration names none; None: as many
as there are attention heads, and the hidden width by these."""
_THETA_BY_DEFAULT = 10_000.0


class _Config(msgspec.Struct, frozen=True):
    """The fields of a config.json that are read. Those with a default may be absent."""

    model_type: Family
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in a folder. Raises LoadError that names the field of config.json which does not fit."""
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise LoadError(f"{path} has more than {MAX_CONFIG_BYTES} bytes; it is no model's configuration")
    return parse_shape(text, str(path))


def parse_shape(text: bytes, where: str = CONFIG) -> ModelShape:
    """The shape that a config.json describes; `where` is its name in messages. Raises LoadError."""
    _refuse_other_family(text, where)
    try:
        config = msgspec.json.decode(text, type=_Config)
    except msgspec.ValidationError as error:
        raise LoadError(f"{where}: {misfit_of(error)}") from error
    _refuse_what_differs(config, where)
    moe = config.model_type == "qwen3_moe"
    theta, scaling = _rope(config, where)
    heads = config.num_attention_heads
    kv_heads, head_dim = _HEADS_BY_DEFAULT[config.model_type]
    shape = ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=(kv_heads or heads) if config.num_key_value_heads is None else config.num_key_value_heads,
        head_dim=config.head_dim or head_dim or config.hidden_size // heads,
        ffn=config.moe_intermediate_size if moe else config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        max_context=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        experts=(config.num_experts or config.num_local_experts or 0) if moe else 0,
        experts_per_token=config.num_experts_per_tok if moe else 0,
        normalize_expert_weights=moe and config.norm_topk_prob,
    )
    _refuse_odd_sizes(shape, where)
    return shape


class _Kind(msgspec.Struct, frozen=True):
    model_type: str


def _refuse_other_family(text: bytes, where: str) -> None:
    try:
        found = msgspec.json.decode(text, type=_Kind).model_type
    except msgspec.DecodeError as error:
        raise LoadError(f"{where}: {misfit_of(error)}") from error
    if found not in FAMILIES:
        raise LoadError(
            f"{where}: model_type is {found!r}; the megatron engine has {', '.join(FAMILIES)}. The hf engine takes "
            "other architectures on one device"
        )


def _refuse_what_differs(config: _Config, where: str) -> None:
    """What the families may have besides, and what is not computed here."""
    allowed: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "quantization_config": (None,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (None, []),
    }
    for name, values in allowed.items():
        found = getattr(config, name)
        if found not in values:
            raise LoadError(
                f"{where}: {name} is {found!r}, which the megatron engine does not compute; it takes {values[0]!r}"
            )
    odd = sorted(set(config.layer_types or ()) - {"full_attention"})
    if odd:
        raise LoadError(
            f"{where}: layer_types has {odd[0]!r}, which the megatron engine does not compute; it takes "
            "'full_attention'"
        )


def _rope(config: _Config, where: str) -> tuple[float, Llama3Rope | None]:
    """The base of the positions' wavelengths and how they are scaled, from newer or older configurations."""
    field = "rope_parameters" if config.rope_parameters is not None else "rope_scaling"
    given = config.rope_parameters if config.rope_parameters is not None else config.rope_scaling or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", config.rope_theta)
    theta = _THETA_BY_DEFAULT if theta is None else theta
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise LoadError(f"{where}: rope_theta is {theta!r}; it must be a positive number")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise LoadError(
            f"{where}: {field}.partial_rotary_factor is {given['partial_rotary_factor']!r}; the megatron engine "
            "turns whole heads (1.0)"
        )
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise LoadError(
            f"{where}: {field}.rope_type is {kind!r}; the megatron engine has 'default' and 'llama3'"
        )
    try:
        return float(theta), msgspec.convert(given, Llama3Rope)
    except msgspec.ValidationError as error:
        raise LoadError(f"{where}: {misfit_of(error, field)}") from error


def _refuse_odd_sizes(shape: ModelShape, where: str) -> None:
    sizes = ["layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "max_context"]
    if shape.family == "qwen3_moe":
        sizes += ["experts", "experts_per_token"]
    for name in sizes:
        if getattr(shape, name) < 1:
            raise LoadError(f"{where}: the model would have {getattr(shape, name)} {name}")
    if shape.heads % shape.kv_heads:
        raise LoadError(
            f"{where}: num_attention_heads is {shape.heads}, which num_key_value_heads ({shape.kv_heads}) does not "
            "divide"
        )
    if shape.experts_per_token > shape.experts:
        raise LoadError(
            f"{where}: num_experts_per_tok is {shape.experts_per_token}, but there are {shape.experts} experts"
        )
