"""Scores of a prompt: logits are computed only for the rows that are asked for, in chunks, whatever the chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines.hf import HfEngine, logprobs
from engines.hf.logprobs import Unembedding
from engines.operations import LoraSpec
from engines.tensors import Matrix, Tensor
from tests.hf.conftest import MakeEngine
from tests.hf.material import Array, numbers, plain_model, request, sample_all, text
from tests.hf.test_sampling import trained


def named(rows: int, cells: dict[int, int]) -> Matrix:
    """One token in some rows, none in the others."""
    column = np.full((rows, 1), -1, dtype=np.int64)
    for row, token in cells.items():
        column[row] = token
    return Matrix((rows, 1), Tensor.of(column))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"prompt_logprobs": True}, 29),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4, "topk_prompt_logprobs": 3}, 4),
        ({"target_prompt_tokens": named(29, {3: 5, 20: 7})}, 2),
        (
            {
                "target_prompt_tokens": named(29, {3: 5, 27: 7}),
                "prompt_logprobs": True,
                "prompt_logprobs_last_n": 4,
            },
            5,
        ),
        ({"prompt_alternatives": 2, "prompt_logprobs": True, "prompt_logprobs_last_n": 4}, 29),
        ({"topk_sample_logprobs": 2}, 0),
    ],
)
def test_only_rows_that_are_asked_for_get_logits(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], rows: int
) -> None:
    computed: list[int] = []
    logits = Unembedding.logits

    def counted(self: Unembedding, hidden: torch.Tensor, segments: Any) -> torch.Tensor:
        computed.append(hidden.shape[0])
        return logits(self, hidden, segments)

    monkeypatch.setattr(Unembedding, "logits", counted)
    sample_all(engine, [request(text(1, 30), max_tokens=1, **settings)])
    assert sum(computed) == rows + 1  # one row is drawn from


def test_chunks_do_not_show(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from one row of logits at a time, in a pack with others, with an adapter."""
    engine = make_engine()
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1))
    wanted = [
        request(
            text(seed, 12 + seed),
            max_tokens=2,
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
            target_prompt_tokens=named(11 + seed, {0: 1, 5: 9, 10 + seed: 250}),
            prompt_alternatives=4,
            adapter=adapter if seed % 2 else None,
        )
        for seed in range(3)
    ]
    whole = [sample_all(engine, [one])[0] for one in wanted]
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 1)
    for found, expected in zip(sample_all(engine, wanted), whole, strict=True):
        assert found.prompt_alternatives is not None and expected.prompt_alternatives is not None
        assert found.prompt_alternatives.tokens == expected.prompt_alternatives.tokens
        for ours, theirs in zip(scores(found), scores(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def scores(result: Any) -> list[Array]:
    return [
        numbers(result.prompt_logprobs),
        numbers(result.topk_prompt_logprobs.logprobs),
        numbers(result.target_prompt_logprobs.values),
        numbers(result.prompt_alternatives.logprobs),
    ]


@pytest.mark.parametrize("model", ["tied", "untied", "llama"])
def test_scores_are_those_of_transformers(
    make_engine: MakeEngine, model_folders: dict[str, str], model: str
) -> None:
    prompt = text(6, 60)
    asked = request(
        prompt,
        max_tokens=1,
        prompt_logprobs=True,
        target_prompt_tokens=named(59, {2: 5, 58: 7}),
        prompt_alternatives=5,
    )
    result = sample_all(make_engine(model), [asked])[0]
    with torch.no_grad():
        logits = plain_model(model_folders[model])(
            input_ids=torch.tensor(prompt.astype(np.int64))[None]
        ).logits[0]
    expected = logits.log_softmax(-1).numpy()[:-1]
    assert result.prompt_logprobs is not None and result.target_prompt_logprobs is not None
    assert result.prompt_alternatives is not None
    own = expected[np.arange(59), prompt[1:]]
    np.testing.assert_allclose(numbers(result.prompt_logprobs)[1:], own, rtol=0, atol=1e-4)
    targets = numbers(result.target_prompt_logprobs.values)[[2, 58], 0]
    np.testing.assert_allclose(targets, [expected[2, 5], expected[58, 7]], rtol=0, atol=1e-4)
    drawn = numbers(result.prompt_alternatives.tokens)
    known = np.take_along_axis(expected, drawn, 1)
    np.testing.assert_allclose(numbers(result.prompt_alternatives.logprobs), known, rtol=0, atol=1e-4)
