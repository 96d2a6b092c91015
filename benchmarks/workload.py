"""The models that are measured, and what they are given: every number follows from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import ROOT

TINY = "tandem/tiny"
LARGER = "random/qwen3-34m"
MODELS = (TINY, LARGER)
"""The built-in model (1.3 million parameters), and a random one that is large enough to keep a processor busy."""

_LARGER_SHAPE: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_SPREAD_OF_A, _SPREAD_OF_B = 0.05, 0.02
"""Large enough that adapters continue a prompt differently."""
Tokens = NDArray[np.int32]


class Batch(NamedTuple):
    """Position i of `inputs` predicts `targets[:, i]`; both int32 [rows, length]."""

    inputs: Tokens
    targets: Tokens


class Shape(NamedTuple):
    """What a step takes: so many sequences, of lengths from `shortest` to `longest`."""

    rows: int
    shortest: int
    longest: int


def model_folder(model: str, root: Path) -> Path:
    """Where a model lies; the random one is made under `root` when it is not there yet."""
    if model == TINY:
        return ROOT / "engines" / "tiny" / "model"
    folder = root / model.replace("/", "-")
    if not (folder / "tokenizer.json").exists():
        _make_random(folder)
    return folder


def vocabulary(folder: Path) -> int:
    """Number of tokens of the model in a folder."""
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return size


def training_batches(size: int, count: int, rows: int, length: int) -> list[Batch]:
    """Random tokens below `size`."""
    tokens = np.random.default_rng(1).integers(0, size, (count, rows, length + 1)).astype(np.int32)
    return [Batch(some[:, :-1], some[:, 1:]) for some in tokens]


def tenant_batches(size: int, count: int, runs: int, shortest: int, longest: int) -> list[list[Batch]]:
    """`count` steps of one sequence for each of the runs, of random lengths from `shortest` to `longest`."""
    rng = np.random.default_rng(3)
    steps = []
    for _ in range(count):
        lengths = rng.integers(shortest, longest + 1, runs)
        rows = [rng.integers(0, size, (1, length + 1)).astype(np.int32) for length in lengths]
        steps.append([Batch(row[:, :-1], row[:, 1:]) for row in rows])
    return steps


def shaped_batches(size: int, count: int, shape: Shape) -> list[list[Batch]]:
    """`count` steps of such a shape: one batch each where lengths are equal, else a batch for each sequence."""
    rows, shortest, longest = shape
    if shortest == longest:
        return [[batch] for batch in training_batches(size, count, rows, longest)]
    return tenant_batches(size, count, rows, shortest, longest)


def prompts(size: int, count: int, shortest: int, longest: int) -> list[list[int]]:
    """Random prompts whose lengths are spread evenly between the two."""
    rng = np.random.default_rng(2)
    lengths = np.linspace(shortest, longest, count).round().astype(int)
    return [rng.integers(0, size, length).tolist() for length in rng.permutation(lengths)]


def random_adapters(model: Path, root: Path, count: int, rank: int) -> list[Path]:
    """Folders, made under `root`, of adapters in PEFT's format on all linear layers and the unembedding: A and B are
    random."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from engines.adapters import peft_config, peft_key
    from engines.operations import LoraSpec

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = {name: part for name, part in empty.named_modules() if isinstance(part, torch.nn.Linear)}
    folders = []
    for seed in range(count):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, layer in layers.items():
            a = torch.randn((rank, layer.in_features), generator=drawn)
            b = torch.randn((layer.out_features, rank), generator=drawn)
            tensors[peft_key(name, "A")] = a * _SPREAD_OF_A
            tensors[peft_key(name, "B")] = b * _SPREAD_OF_B
        folder = root / f"{model.name}-adapter-{seed}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_bytes(peft_config(LoraSpec(rank, seed), "", layers))
        folders.append(folder)
    return folders


def _make_random(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**_LARGER_SHAPE)).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.save(str(folder / "tokenizer.json"))
