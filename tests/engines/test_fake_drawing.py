"""How the fake engine draws tokens, against the definitions of temperature, top-k and top-p written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.fake.drawing import best, draw
from engines.fake.model import log_softmax
from engines.operations import SampleRequest
from tests.engines.material import sample

Array = NDArray[Any]


def kept_by_definition(probabilities: Array, request: SampleRequest) -> Array:
    """The distribution after top-k and then top-p, renormalised; no two probabilities may be equal."""
    order = np.argsort(-probabilities)
    kept: list[int] = list(order[: request.top_k] if request.top_k > 0 else order)
    total, together = probabilities[kept].sum(), 0.0
    nucleus: list[int] = []
    for token in kept:
        if nucleus and together >= request.top_p * total:
            break
        nucleus.append(token)
        together += probabilities[token]
    result = np.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 7, "top_p": 0.6, "temperature": 1.7}],
)
def test_tokens_come_as_often_as_they_should(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(6).normal(0, 2, 30).astype(np.float32)
    request = sample(**settings)
    tempered = np.exp(logits.astype(np.float64) / request.temperature)
    expected = kept_by_definition(tempered / tempered.sum(), request)
    count = 20_000
    found = [draw(logits, request, (i + 0.5) / count) for i in range(count)]
    shares = np.bincount([token.token for token in found], minlength=30) / count
    np.testing.assert_allclose(shares, expected, atol=2.0 / count)
    for token in found[:: count // 50]:
        assert token.logprob == pytest.approx(np.log(tempered[token.token] / tempered.sum()), abs=1e-5)


def test_temperature_zero_takes_the_best_token() -> None:
    logits = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
    token = draw(logits, sample(temperature=0.0, topk_sample_logprobs=3), 0.99)
    assert token.token == 1
    assert token.logprob == pytest.approx(3 - np.log(2 * np.exp(3.0) + np.exp(1.0) + 1), abs=1e-6)
    assert [pair[0] for pair in token.top] == [1, 3, 2]


def test_the_ends_of_the_range_stay_inside_what_is_allowed() -> None:
    logits = np.array([-1e9, 0.0, -1e9, 0.0, -1e9], dtype=np.float32)
    almost_one = 1 - 2.0**-53
    assert {draw(logits, sample(), uniform).token for uniform in (0.0, 0.4999)} == {1}
    assert {draw(logits, sample(), uniform).token for uniform in (0.5001, almost_one)} == {3}
    assert draw(logits, sample(temperature=1e-30), almost_one).token == 3
    assert best(log_softmax(logits), 2)[0][0] == 1
