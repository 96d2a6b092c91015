"""Load a base model, frozen, and put the adapters' linear layers into it."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engines.adapters import ATTENTION_LAYERS, MLP_LAYERS, part_of
from engines.environment import DETERMINISTIC_PRODUCTS, set_defaults
from engines.hf.attention import ATTENTION, ProbeLayout, Unsupported
from engines.hf.logprobs import Unembedding
from engines.hf.norms import replace_norms
from engines.hf.options import HfOptions, cpu_threads
from engines.hf.threads import Threads
from engines.interface import EngineConfig, LoadError
from engines.memory import free_host_bytes
from engines.tuning.collating import Pack, pack
from engines.tuning.experts import expert_sites, replacement
from engines.tuning.grouped import Band, GroupedLinear, GroupedRouting, takes_groups
from engines.tuning.lora import LoraLinear, Routing, Segment, Site
from engines.tuning.packed_attention import Layout
from engines.tuning.products import onednn_is_faster

PROBE_LENGTHS = (7, 12, 12, 5)
"""Sequences of the trial pass at load."""


class BaseModel:
    """The frozen weights of one model on one device. Its layers apply the adapters that `routing` names."""

    def __init__(
        self, module: PreTrainedModel, device: torch.device, max_context: int, threads: Threads
    ) -> None:
        self.module = module
        self.device = device
        self.max_context = max_context
        self.threads = threads
        self.decoder: nn.Module = module.get_decoder()
        self.passes = 0
        self._counting = threading.Lock()
        self.checkpointed = False
        self.deterministic = False
        self.sites, self.routing = _attach(module)
        head = module.get_output_embeddings()
        self.unembedding = Unembedding(head.weight, head.bias, len(self.sites) - 1)
        self._weights = sum(site.in_features * site.out_features for site in self.sites[:-1])

    @property
    def dtype(self) -> torch.dtype:
        weight: torch.dtype = self.unembedding.weight.dtype
        return weight

    def hidden(self, pack: Pack, layout: Layout, segments: Sequence[Segment]) -> Tensor:
        """Hidden states after the last norm, [T, H], of a batch of one pack (or [B, H] of B rows of one token)."""
        self.count_pass()
        self.threads.share(self._weights, pack.tokens.numel())
        self._checkpoint(self.checkpointed and torch.is_grad_enabled())
        with self.routing.along(segments):
            return self._states(pack, layout)

    def count_pass(self) -> None:
        """One more, in whichever lane."""
        with self._counting:
            self.passes += 1

    def hidden_of_bands(self, pack: Pack, layout: Layout, bands: Sequence[Band]) -> Tensor:
        """The same without gradient, of rows whose adapters are bands already."""
        if not bands:
            return self._states(pack, layout)
        assert isinstance(self.routing, GroupedRouting)
        with self.routing.along_bands(bands):
            return self._states(pack, layout)

    def _states(self, pack: Pack, layout: Layout) -> Tensor:
        out = self.decoder(input_ids=pack.tokens, position_ids=pack.positions, use_cache=False, layout=layout)
        states: Tensor = out.last_hidden_state
        return states.reshape(-1, states.shape[-1])

    @contextmanager
    def strict(self) -> Iterator[None]:
        """In deterministic mode, within the context, an operation of CUDA that has no deterministic kernel is an error.
        Flash attention goes back deterministically only then; drawing, which needs a cumulative sum, stays outside."""
        strict = self.deterministic and self.device.type == "cuda"
        if strict:
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            if strict:
                torch.use_deterministic_algorithms(True, warn_only=True)

    def lanes(self, sizes: Sequence[int]) -> list[list[int]]:
        """Positions of training operations of so many tokens each that are computed one beside the other; on a
        processor alone, for other devices need no second thread to be busy."""
        if self.device.type != "cpu":
            return [list(range(len(sizes)))]
        return self.threads.lanes(self._weights, sizes)

    def _checkpoint(self, wanted: bool) -> None:
        """Have the layers of the next pass keep their inputs alone, and compute the rest again on the way back; its
        segments must be in force there too (`routing.along`)."""
        for layer in self.decoder.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing != wanted:
                layer.gradient_checkpointing = wanted
                layer.training = wanted  # of the layer by itself, whose parts drop nothing out
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def logits(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Logits float32 [T, V] of few rows of states [T, H]."""
        self.threads.share(self.unembedding.weight.numel(), hidden.shape[0])
        return self.unembedding.logits(hidden, segments)

    def pack(
        self, sequences: Sequence[Sequence[int] | NDArray[np.generic]], firsts: Sequence[int] | None = None
    ) -> Pack:
        """Lay token sequences one after the other on the device; `firsts` are the positions that they begin at."""
        return pack(self.device, sequences, firsts)

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """End-of-sequence tokens of the generation settings, else of the configuration."""
        settings = self.module.generation_config
        eos = settings.eos_token_id if settings is not None else None
        eos = self.module.config.eos_token_id if eos is None else eos
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (int(eos),)


def load_base_model(config: EngineConfig, options: HfOptions) -> BaseModel:
    """Raises LoadError when the model is not there, is not a causal language model, or cannot be packed."""
    transformers.utils.logging.disable_progress_bar()
    device = _device(options.device)
    if options.memory_fraction is not None:
        take_at_most(options.memory_fraction, device)
    module = _read_weights(config.model, _dtype(options.dtype, device)).to(device)
    return base_model(module, device, options, config.model)


def base_model(module: PreTrainedModel, device: torch.device, options: HfOptions, name: str) -> BaseModel:
    """A model whose weights are on the device, ready for adapters. Raises LoadError when it cannot be packed."""
    threads = Threads(cpu_threads(options))
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    if options.deterministic:
        set_defaults(DETERMINISTIC_PRODUCTS)
    module.requires_grad_(False).eval()
    replace_norms(module)
    base = BaseModel(module, device, _max_context(module, options), threads)
    base.checkpointed = options.checkpointing
    base.deterministic = options.deterministic
    _probe(base, name)
    return base


def take_at_most(fraction: float, device: torch.device) -> None:
    """Have what goes beyond this part of the device's memory fail as if there were no more. Raises LoadError."""
    if device.type != "cuda":
        raise LoadError(
            f"options.memory_fraction is {fraction}: it divides a GPU's memory, and the device is {device}"
        )
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that is free now for this process; None where nobody knows."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free, share - torch.cuda.memory_reserved(device)))
    return free_host_bytes()


def versions(options: HfOptions, device: torch.device) -> dict[str, str]:
    """What the last bits of the numbers depend on."""
    card = {"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return card | {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(cpu_threads(options)),
        "products": "oneDNN" if onednn_is_faster() else "torch",
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"options.device {name!r} cannot be used: {error}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _read_weights(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """Only safetensors are read, never pickles, and no code from the model's repository is run."""
    try:
        module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=ATTENTION, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoadError(f"the model {model!r} cannot be loaded: {error}") from error
    return module


def _max_context(module: PreTrainedModel, options: HfOptions) -> int:
    """The model's limit or the option, whichever is smaller."""
    rope = getattr(module.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise LoadError(
            f"{module.config.model_type} scales its positions with the longest sequence of a pass "
            f"({rope['rope_type']}), so that packed sequences would influence each other"
        )
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is None and options.max_context is None:
        raise LoadError("the model does not say how long a sequence may be: set options.max_context")
    if limit is not None and options.max_context is not None and options.max_context > limit:
        raise LoadError(f"options.max_context is {options.max_context}, but the model has {limit} positions")
    return int(options.max_context or limit or 0)


def _attach(module: PreTrainedModel) -> tuple[list[Site], Routing]:
    """Replace the linear layers that adapters attach to. The unembedding is the last site and stays as it is."""
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LoadError(f"{type(module).__name__} has no linear unembedding layer")
    sites: list[Site] = []
    names = {layer: name for name, layer in module.named_modules()}
    grouped = takes_groups(layer.weight for layer, name in names.items() if _is_adapted(layer, name))
    routing = GroupedRouting(head.weight.dtype) if grouped else Routing()
    for name, layer in list(module.named_modules()):
        if _is_adapted(layer, name):
            linear = GroupedLinear if grouped else LoraLinear
            module.set_submodule(name, linear(layer, len(sites), routing))
            sites.append(Site(name, layer.in_features, layer.out_features))
        elif (experts := replacement(layer, len(sites), routing)) is not None:
            module.set_submodule(name, experts)
            sites.extend(expert_sites(name, layer))
    for part, known in (("attn", ATTENTION_LAYERS), ("mlp", MLP_LAYERS)):
        found = {
            site.name.split(".layers.")[-1].split(".")[0] for site in sites if part_of(site.name) == part
        }
        if len(found) != module.config.num_hidden_layers:
            raise LoadError(
                f"{type(module).__name__}: adapters attach to linear layers named {', '.join(sorted(known))}; only "
                f"{len(found)} of {module.config.num_hidden_layers} layers have one in their {part} part"
            )
    if part_of(names[head]) != "unembed":
        raise LoadError(f"{type(module).__name__} names its unembedding {names[head]}; lm_head is supported")
    return [*sites, Site(names[head], head.in_features, head.out_features)], routing


def _is_adapted(layer: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear) and part_of(name) in ("attn", "mlp")


@torch.inference_mode()
def _probe(base: BaseModel, name: str) -> None:
    """Compare a packed pass with Transformers' own attention, sequence by sequence; raises LoadError.

    Whatever else a model mixes across tokens (state spaces, position biases, soft caps) shows as a difference here.
    """
    vocabulary = base.unembedding.vocabulary
    sequences = [[(7 * i + 13 * length) % vocabulary for i in range(length)] for length in PROBE_LENGTHS]
    layout = ProbeLayout(PROBE_LENGTHS)
    try:
        hidden = base.hidden(base.pack(sequences), layout, ())
        packed = base.unembedding.logits(hidden, ()).log_softmax(-1)
    except (Unsupported, TypeError) as error:
        raise LoadError(f"{name} cannot be served by this engine: {error}") from error
    if layout.window is not None and layout.window < base.max_context:
        raise LoadError(
            f"{name} attends through a window of {layout.window} tokens, which packed attention does not do: "
            f"set options.max_context to at most {layout.window}"
        )
    base.module.set_attn_implementation("eager")
    rows = [
        base.module(base.pack([tokens]).tokens, use_cache=False).logits[0].float() for tokens in sequences
    ]
    base.module.set_attn_implementation(ATTENTION)
    # Of the token that differs most, the mean: single log-probs of a deep model differ more, by rounding to 16 bits.
    difference = (packed - torch.cat(rows).log_softmax(-1)).abs().mean(-1).max().item()
    tolerance = 2e-4 if base.dtype == torch.float32 else 0.25
    if not difference <= tolerance:
        raise LoadError(
            f"{name} gives other log-probs when sequences are packed (difference {difference:.2g}, allowed "
            f"{tolerance}): its layers do more across tokens than attention"
        )
