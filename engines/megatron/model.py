"""One rank's stage of the model: a GPTModel of megatron-core with our linear layers, and a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from engines.interface import LoadError
from engines.megatron.attention import PackedAttention
from engines.megatron.experts import ExpertBlock
from engines.megatron.linears import ColumnLinear, Part, QkvLinear, RowLinear, ShardedLinear
from engines.megatron.logprobs import Unembedding
from engines.megatron.megatron_core import (
    GRAPHED,
    GPTModel,
    IdentityOp,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    parallel_state,
)
from engines.megatron.places import Place
from engines.megatron.portions import Portion
from engines.megatron.rope import Rotary
from engines.megatron.shapes import ModelShape
from engines.megatron.sharding import Sharding
from engines.megatron.weights import Checkpoint, stage_map
from engines.tuning.lora import ANCHOR, Routing, Segment


class Stage:
    """The frozen layers that this rank holds. They apply the adapters that `routing` names."""

    def __init__(
        self,
        shape: ModelShape,
        place: Place,
        device: torch.device,
        dtype: torch.dtype,
        *,
        experts: torch.distributed.ProcessGroup | None = None,
        recompute: bool = False,
    ) -> None:
        """`experts` are the ranks with which it shares the experts of its layers."""
        self.shape = shape
        self.place = place
        self.device = device
        self.routing = Routing()
        self.expert_routing = Routing()
        self.sharding = Sharding(shape, place)
        self.passes = 0
        self.recompute = recompute
        self.module = _build(shape, place, dtype)
        for layer in self.module.decoder.layers:
            if shape.experts:
                layer.mlp = ExpertBlock(shape, len(place.experts(shape.experts)), dtype, experts)
            else:
                layer.mlp = FeedForward(shape, self.module.config)
        self.module.requires_grad_(False)
        self.unembedding: Unembedding | None = None
        """On the last stage."""

    @property
    def _shares_table(self) -> bool:
        """Whether its embedding is its unembedding, which then lies in memory once."""
        return self.shape.tied and self.place.is_first_stage and self.place.is_last_stage

    def load(self, model: Path) -> None:
        """Read this rank's weights; raises LoadError when the checkpoint is not what its configuration says."""
        place, shape = self.place, self.shape
        layers = place.layers(shape.layers)
        if self._shares_table:
            self.module.output_layer.weight = self.module.embedding.word_embeddings.weight
        wanted = stage_map(
            layers.start,
            len(layers),
            head_norms=shape.qk_norm,
            experts=place.experts(shape.experts),
            is_first=place.is_first_stage,
            is_last=place.is_last_stage,
            tied=shape.tied,
        )
        if self._shares_table:
            wanted = (parameter for parameter in wanted if parameter.name != "output_layer.weight")
        left = dict(self.module.named_parameters())
        with Checkpoint(model, place.tensor, place.layout.tensor) as checkpoint, torch.no_grad():
            for parameter in wanted:
                read = checkpoint.read(parameter)
                own = left.pop(parameter.name)
                if own.shape != read.shape:
                    raise LoadError(
                        f"{parameter.sources[0].name} of {model} gives {list(read.shape)} to {parameter.name}, which "
                        f"has {list(own.shape)}"
                    )
                own.copy_(read)
        if left:
            raise LoadError(f"the megatron engine reads no weights for {', '.join(sorted(left))}")
        self.module.to(self.device)
        self.module.rotary_pos_emb = Rotary(shape, self.device)
        self._adapt()
        if self.recompute:
            for layer in self.module.decoder.layers:
                layer.forward = _computed_again(layer.forward, self.routing, self.expert_routing)

    def forward(self, portion: Portion, expert_segments: Sequence[Segment]) -> Tensor:
        """What the next stage takes, [t, 1, H]; of the last stage the hidden states [1, t, H] after the last norm.

        `expert_segments` are those among the rows of all ranks that share experts (`portions.pooled`).
        """
        self.passes += 1
        with self.routing.along(portion.segments), self.expert_routing.along(expert_segments):
            out: Tensor = self.module(
                portion.tokens, portion.positions, None, packed_seq_params=portion.packing
            )
        return out

    def _adapt(self) -> None:
        """Tell each layer which sites its outputs are, and take the unembedding out of the model."""
        number = 0
        for layer in self.module.decoder.layers:
            attention, mlp = layer.self_attention, layer.mlp
            linears = [(attention.linear_qkv, 3), (attention.linear_proj, 1)]
            if not self.shape.experts:
                linears += [(mlp.linear_fc1, 2), (mlp.linear_fc2, 1)]
            for linear, count in linears:
                self._adapt_linear(linear, number, count)
                number += count
            if self.shape.experts:
                number += mlp.adapt(number, self.expert_routing)
        if self.place.is_first_stage:
            self.module.embedding.register_forward_hook(_anchored)
        if self.place.is_last_stage:
            weight = self.module.output_layer.weight
            first = self.place.tensor * weight.shape[0]
            group = parallel_state.get_tensor_model_parallel_group()
            self.unembedding = Unembedding(weight, first, number, group, self.module.config.sequence_parallel)
            self.module.output_layer = _Passing()

    def _adapt_linear(self, linear: ShardedLinear, number: int, count: int) -> None:
        """`count` sites from `number` on are the linear layer's outputs, one after the other."""
        parts, start = [], 0
        for site in range(number, number + count):
            stop = start + self.sharding.sites[site].out_features
            parts.append(Part(site, start, stop))
            start = stop
        linear.adapt(parts, self.routing)


class RmsNorm(nn.Module):
    """`F.rms_norm` with a frozen weight. Takes what megatron-core's own is made with."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **ignored: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`. How megatron-core makes its own differs from one version to the next."""

    def __init__(self, shape: ModelShape, config: Any) -> None:
        super().__init__()
        group = parallel_state.get_tensor_model_parallel_group()
        self.linear_fc1 = ColumnLinear(shape.hidden, 2 * shape.ffn, config=config, tp_group=group)
        self.linear_fc2 = RowLinear(shape.ffn, shape.hidden, config=config, tp_group=group)

    def forward(self, x: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        """[t, 1, H] to the same, and no bias."""
        gate, up = self.linear_fc1(x)[0].chunk(2, dim=-1)
        out: tuple[Tensor, None] = self.linear_fc2(F.silu(gate) * up)
        return out


def _computed_again(forward: Callable[..., Any], *routings: Routing) -> Callable[..., Any]:
    """A layer's forward pass, which keeps its inputs alone and is repeated on the way back, with the segments that were
    in force; other micro-batches may have been under way since."""

    def repeatable(*args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        segments = [routing.segments for routing in routings]

        def run(*args: Any, **named: Any) -> Any:
            before = [routing.segments for routing in routings]
            _set(routings, segments)
            try:
                return forward(*args, **named)
            finally:
                _set(routings, before)

        return recomputed(run, *args, use_reentrant=False, preserve_rng_state=False, **named)

    return repeatable


def _set(routings: Sequence[Routing], segments: Sequence[Sequence[Segment]]) -> None:
    for routing, own in zip(routings, segments, strict=True):
        routing.segments = own


class _Passing(nn.Module):
    """In the place of the unembedding: hidden states leave the model as they are."""

    def forward(self, hidden: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        return hidden, None


class _Anchored(torch.autograd.Function):
    """The embeddings, as something that a backward pass arrives at, whatever adapters there are behind them."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, anchor: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _anchored(module: nn.Module, given: Any, states: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Anchored.apply
    return apply(states, ANCHOR) if torch.is_grad_enabled() else states


def _build(shape: ModelShape, place: Place, dtype: torch.dtype) -> Any:
    config = _config(shape, place, dtype)
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RmsNorm
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = QkvLinear, RowLinear
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    layer.submodules.mlp = IdentityOp  # until the stage puts its own there
    layers = [layer] * len(place.layers(shape.layers))
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=RmsNorm),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.max_context,
        pre_process=place.is_first_stage,
        post_process=place.is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )


def _config(shape: ModelShape, place: Place, dtype: torch.dtype) -> Any:
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=place.layout.tensor,
        pipeline_model_parallel_size=place.layout.pipeline,
        sequence_parallel=place.layout.sequence,
        calculate_per_token_loss=True,  # losses are sums: nothing is divided by the number of micro-batches
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # which variable lengths demand, of a dense model too
        batch_p2p_sync=False,
        **{GRAPHED: []},
    )
