"""An adapter that PEFT itself has made and saved, imported: sampled and trained as PEFT does it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from engines.hf import HfEngine
from engines.interface import UserError
from engines.operations import AdapterRef
from engines.storage import FolderStorage
from gateway.adapter_files import Imported, rewrite_adapter
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    TIED,
    create,
    difference,
    engine_factors,
    factors,
    forward,
    forward_backward,
    logprobs,
    numbers,
    own_logprobs,
    plain_model,
    request,
    sample_all,
    step,
    supervised,
    text,
)

KEY = "checkpoints/imported"


def made_by_peft(folder: str, targets: list[str], alpha: int, target: Path) -> PeftModel:
    """A model with an adapter of random numbers (B too), saved into `target`."""
    torch.manual_seed(7)
    config = LoraConfig(
        r=4, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(plain_model(folder), config)
        with torch.no_grad():
            for name, weight in factors(model).items():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
        model.save_pretrained(str(target), save_embedding_layers=False)
    return model


def brought_in(engine: HfEngine, source: Path, tmp_path: Path) -> Imported:
    with FolderStorage(tmp_path / "storage").write(KEY) as target:
        return rewrite_adapter(source, target, engine.info())


CASES = [
    ("tied", ["q_proj", "v_proj"], 7, (8, 4)),
    ("untied", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 64, (14, 0)),
    ("llama", ["down_proj"], 4, (6, 4)),
    ("untied", ["o_proj", "lm_head"], 3, (9, 6)),
]


@pytest.mark.parametrize(("model", "targets", "alpha", "layers"), CASES)
def test_it_is_trained_and_sampled_as_peft_does(
    make_engine: MakeEngine,
    model_folders: dict[str, str],
    tmp_path: Path,
    model: str,
    targets: list[str],
    alpha: int,
    layers: tuple[int, int],
) -> None:
    engine = make_engine(model)
    reference = made_by_peft(model_folders[model], targets, alpha, tmp_path / "peft")
    imported = brought_in(engine, tmp_path / "peft", tmp_path)
    assert (imported.layers, imported.zero_layers) == layers
    assert (imported.lora.rank, imported.lora.alpha) == (4, alpha)
    create(engine, spec=imported.lora, folder=KEY)

    tokens = text(5, 24)
    with torch.no_grad():
        expected = own_logprobs(reference, tokens[:-1], tokens[1:].astype(np.int64))
        base = own_logprobs(plain_model(model_folders[model]), tokens[:-1], tokens[1:].astype(np.int64))
    assert difference(base, expected) > 1e-3  # the adapter does something
    [sampled] = sample_all(
        engine, [request(tokens, max_tokens=1, prompt_logprobs=True, adapter=AdapterRef(KEY, KEY))]
    )
    assert sampled.prompt_logprobs is not None
    np.testing.assert_allclose(numbers(sampled.prompt_logprobs)[1:], expected.numpy(), atol=1e-4)
    data = supervised([9, 14])
    with torch.no_grad():
        for found, datum in zip(logprobs(forward(engine, data)), data, strict=True):
            targets_of = numbers(datum.loss_inputs["target_tokens"])
            plain = own_logprobs(reference, numbers(datum.tokens), targets_of)
            np.testing.assert_allclose(found, plain.numpy(), atol=1e-4)

    weights = factors(reference)
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(5):
        batch = supervised([9, 14], seed=number)
        forward_backward(engine, batch)
        for datum in batch:
            targets_of = numbers(datum.loss_inputs["target_tokens"])
            share = torch.tensor(numbers(datum.loss_inputs["weights"]))
            (-(own_logprobs(reference, numbers(datum.tokens), targets_of) * share).sum()).backward()
        norm = step(engine, learning_rate=2e-3, eps=1e-8, weight_decay=0.1)["unclipped_grad_l2:mean"]
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(list(weights.values()), float("inf"))), rel=1e-4
        )
        optimizer.step()
        optimizer.zero_grad()
    trained = engine_factors(engine)
    for name, weight in weights.items():
        assert difference(trained[name], weight.detach()) <= 1e-4, name
    zeros = trained.keys() - weights.keys()
    assert len(zeros) == 2 * imported.zero_layers
    assert not any(trained[name].any() for name in zeros)  # layers that the adapter did not have stay so


def test_an_adapter_with_a_copy_of_the_base_model_is_refused(
    make_engine: MakeEngine, model_folders: dict[str, str], tmp_path: Path
) -> None:
    """What PEFT saves beside an adapter on the unembedding when nobody tells it not to."""
    engine = make_engine("untied")
    reference = made_by_peft(model_folders["untied"], ["lm_head"], 8, tmp_path / "peft")
    reference.save_pretrained(str(tmp_path / "whole"), save_embedding_layers=True)
    with pytest.raises(UserError, match="base_layer"):
        brought_in(engine, tmp_path / "whole", tmp_path)
