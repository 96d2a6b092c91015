"""Drawing by inversion against the distributions that it must follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engines.drawing import Draw, Drawn, draw
from engines.operations import SampleRequest
from engines.shaping import Changes, Shaping
from engines.tensors import Tensor

VOCABULARY = 12


def plain(
    uniform: float, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, top: int = 0, **more: Any
) -> Draw:
    return Draw(temperature, top_k, top_p, uniform, top, **more)


def biased(bias: float) -> Changes | None:
    """A bias on three tokens."""
    prompt = Tensor.of(np.array([1], dtype=np.int32))
    return Shaping(SampleRequest(prompt, 1, 1, logit_bias=dict.fromkeys((2, 5, 7), bias))).changes()


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def frequencies(logits: torch.Tensor, count: int = 4000, **settings: Any) -> torch.Tensor:
    """Shares of the tokens that evenly spread uniforms draw: within 1/count of the probabilities."""
    draws = [plain((i + 0.5) / count, **settings) for i in range(count)]
    drawn = draw(logits.repeat(count, 1), draws)
    return torch.bincount(torch.tensor(drawn.tokens), minlength=VOCABULARY) / count


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (3, 1.0), (-1, 0.7), (5, 0.6), (1, 1.0), (-1, 1e-9)])
def test_follows_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Expected: temperature, then Transformers' own top-k and top-p."""
    logits = logits_of(4)
    expected = logits / temperature
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = frequencies(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found, expected.softmax(1)[0], rtol=0, atol=6e-4)


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"), [(0.2, -1, 1.0), (0.05, 4, 1.0), (0.1, -1, 0.8), (1.0, -1, 1.0)]
)
def test_min_p_is_that_of_transformers(min_p: float, top_k: int, top_p: float) -> None:
    """Behind the temperature, before top-k and top-p."""
    logits = logits_of(5)
    expected = MinPLogitsWarper(min_p)(None, logits / 1.5)
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = frequencies(logits, temperature=1.5, min_p=min_p, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found, expected.softmax(1)[0], rtol=0, atol=6e-4)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    """Of the tokens of the prompt and of those that were drawn."""
    logits = logits_of(6)
    prompt = Tensor.of(np.array([3, 5, 3], dtype=np.int32))
    shaping = Shaping(SampleRequest(prompt, 1, 1, repetition_penalty=1.7))
    shaping.add(9)
    seen = torch.tensor([[3, 5, 3, 9]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone()) / 0.8
    found = frequencies(logits, temperature=0.8, changes=shaping.changes())
    torch.testing.assert_close(found, expected.softmax(1)[0], rtol=0, atol=6e-4)


def test_logprobs_are_after_temperature_and_before_the_cut() -> None:
    logits = logits_of(7)
    drawn = draw(logits.clone(), [plain(0.3, temperature=0.5, top_k=2)])
    expected = (logits / 0.5).log_softmax(1)[0, drawn.tokens[0]]
    assert drawn.logprobs[0] == pytest.approx(float(expected), abs=1e-5)


def test_greedy_takes_the_best_with_its_untempered_logprob() -> None:
    logits = logits_of(8)
    drawn = draw(logits.clone(), [plain(0.9, temperature=0.0, top=3)])
    best = logits.log_softmax(1)[0].topk(3)
    assert drawn.tokens == [int(best.indices[0])]
    assert drawn.logprobs[0] == pytest.approx(float(best.values[0]), abs=1e-5)
    assert [token for token, _ in drawn.tops[0]] == best.indices.tolist()
    np.testing.assert_allclose([value for _, value in drawn.tops[0]], best.values.tolist(), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    kinds = [
        plain(0.1),
        plain(0.5, temperature=0.0),
        plain(0.7, temperature=0.3),
        plain(0.99, top_k=4),
        plain(0.4, temperature=2.0, top_p=0.5, top=2),
        plain(0.4, changes=biased(2.0)),
        plain(0.4, temperature=0.0, changes=biased(9.0)),
        plain(0.9, min_p=0.2, changes=biased(-3.0)),
    ]
    logits = torch.cat([logits_of(seed) for seed in range(len(kinds))])
    together = draw(logits.clone(), kinds)
    for i, kind in enumerate(kinds):
        alone = draw(logits[i : i + 1].clone(), [kind])
        assert alone == Drawn([together.tokens[i]], [together.logprobs[i]], [together.tops[i]])


@pytest.mark.parametrize("uniform", [0.0, 0.5, float(np.nextafter(1.0, 0.0))])
@pytest.mark.parametrize("top_k", [-1, 2])
def test_never_draws_what_has_no_probability(uniform: float, top_k: int) -> None:
    logits = torch.full((1, VOCABULARY), float("-inf"))
    logits[0, 5] = 1.0
    assert draw(logits, [plain(uniform, top_k=top_k)]).tokens == [5]


def test_a_tiny_temperature_does_not_overflow() -> None:
    drawn = draw(logits_of(3) * 100, [plain(0.5, temperature=1e-38)])
    assert drawn.logprobs == [0.0]


def test_numbers_that_are_none_are_seen() -> None:
    assert np.isnan(draw(torch.full((1, VOCABULARY), float("nan")), [plain(0.5)]).logprobs[0])
