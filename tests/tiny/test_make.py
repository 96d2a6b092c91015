"""The script that makes the model, on a small scale."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines.tiny import make, pretrain
from engines.tiny import tokenizer as tokenizers_of_tiny
from engines.tiny.corpus import documents

PLAN = pretrain.Plan(steps=8, tokens_per_step=256, short_row=64, long_row=128, warm_up=2)


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    torch.set_num_threads(1)
    return tokenizers_of_tiny.trained(pretrain.plain(text.text for text in islice(documents(1), 20_000)))


def test_the_script_writes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    make.main(["--out", str(out), "--steps", "2", "--threads", "1", "--texts", "20000", "--held-out", "20"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == 1536
    assert "held-out loss" in capsys.readouterr().out


def test_training_is_a_function_of_the_seed(tokens: Tokenizer) -> None:
    def trained() -> tuple[list[float], dict[str, Any]]:
        model, losses = pretrain.built(tokens, PLAN.seed), []
        pretrain.train(model, tokens, PLAN, lambda step, loss: losses.append(loss))
        return losses, model.state_dict()

    (losses, first), (_, second) = trained(), trained()
    assert len(losses) == PLAN.steps
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_attention_does_not_cross_documents_in_short_rows(tokens: Tokenizer) -> None:
    model = pretrain.built(tokens, 1).eval()
    rows, positions = next(pretrain.batches(tokens, PLAN))
    second = int((positions[0] == 0).nonzero()[1])
    end = second + int((positions[0, second + 1 :] != 0).long().cumprod(0).sum()) + 1
    with torch.no_grad():
        packed = model(input_ids=rows[:1], position_ids=positions[:1], use_cache=False).logits[0, second:end]
        alone = model(input_ids=rows[:1, second:end]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_every_few_batches_are_long(tokens: Tokenizer) -> None:
    shapes = [(tuple(rows.shape), int(at.max())) for rows, at in islice(pretrain.batches(tokens, PLAN), 8)]
    assert [shape for shape, _ in shapes] == 2 * ([(4, 65)] * 3 + [(2, 129)])
    assert shapes[3][1] == 128


def test_the_learning_rate_rises_then_falls() -> None:
    plan = pretrain.Plan(steps=100, warm_up=10, learning_rate=1.0, final_rate=0.1)
    rates = [pretrain.rate(plan, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)


def test_a_foreign_tokenizer_is_refused() -> None:
    foreign = Tokenizer(models.BPE())
    with pytest.raises(ValueError, match=r"no token '<\|im_end\|>'"):
        tokenizers_of_tiny.special_id(foreign, "<|im_end|>")
