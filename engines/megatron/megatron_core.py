"""Everything that is used of megatron-core, imported in one place: it warns of whatever is not installed, and its names
move between versions."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import mappings, model_parallel_cuda_manual_seed
    from megatron.core.tensor_parallel import random as parallel_random
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

VERSION: str = megatron.core.__version__
SUPPORTED = ("0.16.1", "0.19.2")
"""Versions that the tests run with: of Python 3.11, and of 3.12 and newer, which the later one asks for."""

GRAPHED = (
    "cuda_graph_modules"
    if "cuda_graph_modules" in TransformerConfig.__dataclass_fields__
    else "cuda_graph_scope"
)
"""Of a configuration: what is to be recorded as CUDA graphs, as the version calls it."""

__all__ = [
    "GRAPHED",
    "SUPPORTED",
    "VERSION",
    "GPTModel",
    "IdentityOp",
    "MegatronModule",
    "ModuleSpec",
    "PackedSeqParams",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "mappings",
    "model_parallel_cuda_manual_seed",
    "parallel_random",
    "parallel_state",
]
