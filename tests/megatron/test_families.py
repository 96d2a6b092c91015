"""Llama beside Qwen3: its scaled positions, and the same numbers as the engine on Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engines.contract.material import Caller, distance
from engines.hf import HfEngine
from engines.megatron.rope import Rotary, frequencies
from engines.megatron.shapes import parse_shape
from tests.hf.conftest import write_tokenizer
from tests.megatron.conftest import configuration, running
from tests.megatron.shapes import LLAMA3, encoded, tiny_config
from tests.megatron.test_layouts import caller_logprobs, trained

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Llama whose positions are scaled, for most of its frequencies within the data's lengths."""
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("llama", eos_token_id=257)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3, {**LLAMA3, "factor": 3.0, "high_freq_factor": 8.0}])
def test_positions_turn_as_in_transformers(rope: dict[str, float]) -> None:
    """Each pair's frequency, and the angles of positions in any order."""
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**tiny_config("llama", rope_parameters=rope)))
    shape = parse_shape(encoded("llama", rope_parameters=rope))
    torch.testing.assert_close(frequencies(shape), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([5, 0, 200, 6])
    cos, sin = theirs(torch.zeros(1, 4, 16), positions[None])
    angles = Rotary(shape, torch.device("cpu"))(positions)[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=1e-5)


def test_scaling_changes_some_frequencies_and_keeps_others() -> None:
    plain = frequencies(parse_shape(encoded("llama", rope_parameters={**PLAIN, "rope_theta": 5e5})))
    scaled = frequencies(parse_shape(encoded("llama")))
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "sequence": True, "recompute": True}, {"context": 2}], ids=str
)
def test_llama_trains_with_the_numbers_of_transformers(
    layout: dict[str, int], llama_folder: str, tmp_path: Path
) -> None:
    hf = HfEngine.load(configuration("hf", llama_folder, tmp_path))
    expected, theirs = trained(Caller(hf), "checkpoints/hf", tmp_path)
    with running(llama_folder, tmp_path, pass_tokens=32, **layout) as engine:
        caller = Caller(engine)
        assert distance(caller_logprobs(caller), caller_logprobs(Caller(hf))) < 1e-5
        losses, ours = trained(caller, "checkpoints/megatron", tmp_path)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert distance([ours[name]], [values]) < 1e-4, name
