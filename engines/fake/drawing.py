"""Draw one token from one row of logits, by inversion of the cumulative distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.fake.model import log_softmax
from engines.interface import Token
from engines.operations import SampleRequest
from engines.shaping import Changes

Array = NDArray[Any]


def draw(logits: Array, request: SampleRequest, uniform: float, changes: Changes | None = None) -> Token:
    """The token that `uniform` in [0, 1) decides on, with its log-prob before changes and cuts, from logits [V].

    Temperature 0 takes the best token and reports log-probs at temperature 1.
    """
    scores = _tempered(logits, request.temperature)
    shaped = scores if changes is None else _tempered(_changed(logits, changes), request.temperature)
    token = int(shaped.argmax()) if request.temperature == 0 else _invert(shaped, request, uniform)
    return Token(token, float(scores[token]), best(scores, request.topk_sample_logprobs))


def _tempered(logits: Array, temperature: float) -> Array:
    shifted = logits - logits.max()  # first, so that no division by a small temperature overflows
    with np.errstate(over="ignore"):  # to minus infinity, which is probability zero
        return log_softmax(shifted / np.float32(temperature or 1.0))


def _changed(logits: Array, changes: Changes) -> Array:
    changed = logits.copy()
    own = logits[changes.tokens] + changes.bias
    changed[changes.tokens] = np.where(own > 0, own / changes.factor, own * changes.factor) - changes.offset
    return changed


def best(scores: Array, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` best tokens as (token, score), best first, the smaller id first among equals."""
    if not count:
        return ()
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(zip(order.tolist(), scores[order].tolist(), strict=True))


def _invert(scores: Array, request: SampleRequest, uniform: float) -> int:
    """The first token whose cumulative probability exceeds `uniform` of the total; without cuts in order of ids."""
    order = np.arange(len(scores))
    weights = np.exp(scores.astype(np.float64))
    if request.top_k > 0 or request.top_p < 1 or request.min_p > 0:
        order = np.argsort(-scores, kind="stable")
        weights = _cut(scores[order], weights[order], request)
    cumulative = weights.cumsum()
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(order[min(place, int(weights.nonzero()[0][-1]))])


def _cut(scores: Array, weights: Array, request: SampleRequest) -> Array:
    """Weights, best first, zero where min-p, top-k and then top-p cut.

    Min-p keeps what has at least that share of the best one's probability. Top-k keeps what is as good as the k-th
    best. Top-p, of what those left, keeps a token while those before it have less than p of the total together, so
    always the best one.
    """
    weights = np.where(weights >= request.min_p * weights[0], weights, 0.0)
    if 0 < request.top_k < len(scores):
        weights = np.where(scores >= scores[request.top_k - 1], weights, 0.0)
    before = weights.cumsum() - weights
    return np.where(before < request.top_p * weights.sum(), weights, 0.0)
