"""What loads, what is refused and why; bfloat16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from engines.hf.model import free_bytes
from engines.hf.options import HfOptions, cpu_threads
from engines.interface import LoadError
from engines.operations import LoraSpec
from tests.hf.conftest import SHAPE, MakeEngine, write_tokenizer
from tests.hf.material import (
    Array,
    create,
    forward,
    forward_backward,
    logprobs,
    numbers,
    request,
    sample_all,
    step,
    supervised,
    text,
)

TINY: dict[str, Any] = {**SHAPE, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, engines.hf; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_tells_what_was_loaded(make_engine: MakeEngine) -> None:
    info = make_engine(max_context=100, max_rank=16).info()
    assert (info.base_model, info.architecture) == ("test/tied", "Qwen3ForCausalLM")
    assert (info.vocab_size, info.max_context, info.max_rank, info.eos_tokens) == (288, 100, 16, (257,))
    assert info.losses == ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "custom")
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.versions["torch"] == torch.__version__


def test_tokenizer_files_are_the_models(make_engine: MakeEngine, model_folders: dict[str, str]) -> None:
    files = make_engine().tokenizer_files()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    for name, content in files.items():
        assert content == (Path(model_folders["tied"]) / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"treads": 2}, "treads.*options of the hf engine are device"),
        ({"max_rank": "big"}, "max_rank"),
        ({"sample_slots": 0}, "sample_slots is 0"),
        ({"dtype": "float64"}, "float64.*bfloat16"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"device": "abacus"}, "abacus"),
        ({"memory_fraction": 1.5}, r"memory_fraction is 1\.5; it must be above 0 and at most 1"),
        ({"memory_fraction": 0.0}, r"memory_fraction is 0\.0"),
        (
            {"memory_fraction": 0.5},
            r"memory_fraction is 0\.5: it divides a GPU's memory, and the device is cpu",
        ),
        ({"max_context": 1000}, "1000.*512 positions"),
    ],
)
def test_options_are_refused_by_name(make_engine: MakeEngine, options: dict[str, Any], match: str) -> None:
    with pytest.raises(LoadError, match=match):
        make_engine(**options)


def test_a_missing_model_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nowhere' cannot be found: there is no such folder"):
        make_engine(str(tmp_path / "nowhere"))


def stored(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def test_a_window_is_refused_unless_the_context_fits_into_it(make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = stored(MistralForCausalLM(MistralConfig(**TINY, sliding_window=40)), tmp_path)
    with pytest.raises(LoadError, match="max_context to at most 40"):
        make_engine(folder)
    assert make_engine(folder, max_context=40).info().max_context == 40


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY)), "softcap"),
        (
            lambda: MambaForCausalLM(MambaConfig(**{**TINY, "state_size": 8})),
            "linear layers named",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=4)),
            "linear layers named",
        ),
    ],
)
def test_models_that_cannot_be_packed_or_adapted_are_refused(
    make_engine: MakeEngine, tmp_path: Path, model: Any, match: str
) -> None:
    folder = stored(model(), tmp_path)
    with pytest.raises(LoadError, match=match):
        make_engine(folder)


def test_a_model_that_mixes_tokens_elsewhere_is_refused(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that looks at its neighbour, as a convolution would: only the comparison at load can see it."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    plain = Qwen3RMSNorm.forward

    def leaking(self: Any, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = plain(self, states)
        return out + 0.1 * out.roll(1, dims=1) if states.dim() == 3 else out

    monkeypatch.setattr(Qwen3RMSNorm, "forward", leaking)
    with pytest.raises(LoadError, match="when sequences are packed"):
        make_engine()


def test_bfloat16_trains_and_samples(make_engine: MakeEngine) -> None:
    """The base in bfloat16, adapters in float32: close to the float32 engine, and learning."""
    exact, rough = make_engine(), make_engine(dtype="bfloat16")
    data = supervised([20, 12])
    losses: list[list[float]] = []
    fresh: list[Array] = []
    for engine in (exact, rough):
        create(engine, spec=LoraSpec(rank=4, seed=5))
        fresh.append(np.concatenate(logprobs(forward(engine, data))))
        losses.append([forward_backward(engine, data).metrics["loss:sum"]])
        for _ in range(5):
            step(engine, learning_rate=1e-2)
            losses[-1].append(forward_backward(engine, data).metrics["loss:sum"])
    assert rough.info().dtype == "bfloat16"
    assert rough.runs["run"].adapter.values.dtype == torch.float32
    assert fresh[1].dtype == np.float32
    np.testing.assert_allclose(fresh[1], fresh[0], rtol=0, atol=0.1)
    assert np.abs(fresh[1] - fresh[0]).mean() > 1e-4
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.01)
    assert losses[1][-1] < losses[1][0] - 10
    result = sample_all(rough, [request(text(0, 10), prompt_logprobs=True)])[0]
    assert np.isfinite(numbers(result.sequences[0].logprobs)).all()


def test_threads_are_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 6}, raising=False)
    assert cpu_threads(HfOptions()) == 3
    assert cpu_threads(HfOptions(threads=5)) == 5
    monkeypatch.delattr("os.sched_getaffinity")
    assert cpu_threads(HfOptions()) == 64


@pytest.mark.parametrize(
    ("free", "fraction", "reserved", "left"),
    [
        (70, 1.0, 10, 70),  # nothing is set: all that is free
        (70, 0.5, 10, 30),  # half of 80, of which it has 10
        (20, 0.5, 10, 20),  # another process has the rest of that already
        (70, 0.5, 45, 0),
    ],
)
def test_of_a_gpu_no_more_is_free_than_its_part(
    monkeypatch: pytest.MonkeyPatch, free: int, fraction: float, reserved: int, left: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert free_bytes(torch.device("cuda:0")) == left
