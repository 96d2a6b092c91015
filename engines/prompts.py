"""Scoring a prompt: which rows of logits a request needs, and its results put together from chunks of them.

Row i of a prompt's N - 1 rows is what the model expects of token i + 1. An engine computes the rows of `rows_wanted`,
in that order and as many at a time as it likes, and shows each chunk as a `Chunk`; nothing here knows its arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.operations import PromptAlternatives, SampleRequest, TopLogprobs
from engines.sampling import row_uniforms
from engines.tensors import Matrix, Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Chunk(Protocol):
    """Untempered log-probs of R rows."""

    def at(self, rows: Ints, tokens: Ints) -> Floats:
        """Log-prob [n] of token i in row i of the chunk."""

    def best(self, first: int, count: int) -> tuple[NDArray[Any], Floats]:
        """The best tokens of the rows from `first` on, best first, and their log-probs: [R - first, count] each."""

    def draw(self, temperature: float, uniforms: NDArray[np.float64]) -> Ints:
        """Tokens [R, k] by inversion of the distribution at this temperature; 0 takes the best one."""


class PromptScores(NamedTuple):
    """What a `SampleResult` says of the prompt; None: not asked for."""

    prompt_logprobs: Tensor | None = None
    topk_prompt_logprobs: TopLogprobs | None = None
    target_prompt_logprobs: Matrix | None = None
    prompt_alternatives: PromptAlternatives | None = None


def rows_wanted(request: SampleRequest) -> Ints:
    """The rows whose logits a request needs, ascending; the others need never be computed."""
    if request.prompt_alternatives:
        return np.arange(_rows(request))
    own = np.arange(_first_own_row(request), _rows(request))
    if request.target_prompt_tokens is None:
        return own
    rows, tokens = request.target_prompt_tokens.cells()
    return np.union1d(own, rows[tokens >= 0])


def first_token_needed(request: SampleRequest) -> int:
    """Of the tokens before this one, a pass needs no states: their rows are not asked for, and nothing is drawn."""
    rows = rows_wanted(request)
    return int(rows[0]) if len(rows) else _rows(request)


def score_prompt(request: SampleRequest, chunks: Iterable[tuple[int, Chunk]]) -> PromptScores:
    """The scores that a request asks for, from (number of rows, chunk) of all of `rows_wanted`."""
    scores = _Scores(request)
    wanted = rows_wanted(request)
    start = 0
    for size, chunk in chunks:
        scores.add(chunk, wanted[start : start + size])
        start += size
    return scores.result()


def _rows(request: SampleRequest) -> int:
    return request.prompt.shape[0] - 1


def _first_own_row(request: SampleRequest) -> int:
    """From here on the prompt's own tokens are scored; N - 1 when they are not."""
    rows = _rows(request)
    if not (request.prompt_logprobs or request.topk_prompt_logprobs):
        return rows
    return 0 if request.prompt_logprobs_last_n is None else max(0, rows - request.prompt_logprobs_last_n)


class _Scores:
    """The arrays that results are made of, filled chunk by chunk."""

    def __init__(self, request: SampleRequest) -> None:
        rows, count, drawn = _rows(request), request.topk_prompt_logprobs, request.prompt_alternatives
        self._request = request
        self._prompt: Ints = request.prompt.array().astype(np.int64)
        self._first = _first_own_row(request)
        self._own = np.full(rows + 1, np.nan, dtype=np.float32)
        self._best = np.zeros((rows + 1, count), dtype=np.int32)
        self._best_scores = np.full((rows + 1, count), np.nan, dtype=np.float32)
        self._drawn = np.zeros((rows, drawn), dtype=np.int64)
        self._drawn_scores = np.zeros((rows, drawn), dtype=np.float32)
        cells = np.zeros((2, 0), dtype=np.int64)
        if request.target_prompt_tokens is not None:
            cells = np.stack([part.astype(np.int64) for part in request.target_prompt_tokens.cells()])
        self._cell_rows, self._cell_tokens = cells
        self._cell_scores = np.zeros(cells.shape[1], dtype=np.float32)

    def add(self, chunk: Chunk, rows: Ints) -> None:
        """Take what these rows tell."""
        first = int(np.searchsorted(rows, self._first))
        own = rows[first:] + 1
        if self._request.prompt_logprobs and len(own):
            self._own[own] = chunk.at(np.arange(first, len(rows)), self._prompt[own])
        if self._request.topk_prompt_logprobs and len(own):
            self._best[own], self._best_scores[own] = chunk.best(first, self._request.topk_prompt_logprobs)
        self._add_cells(chunk, rows)
        if self._request.prompt_alternatives:
            self._add_drawn(chunk, rows)

    def _add_cells(self, chunk: Chunk, rows: Ints) -> None:
        start, stop = np.searchsorted(self._cell_rows, [rows[0], rows[-1] + 1])
        places = start + np.flatnonzero(self._cell_tokens[start:stop] >= 0)
        if len(places):
            inside = np.searchsorted(rows, self._cell_rows[places])
            self._cell_scores[places] = chunk.at(inside, self._cell_tokens[places])

    def _add_drawn(self, chunk: Chunk, rows: Ints) -> None:
        request = self._request
        count = request.prompt_alternatives
        uniforms = np.stack([row_uniforms(request.seed, row, count) for row in rows.tolist()])
        tokens = chunk.draw(request.temperature, uniforms)
        scores = chunk.at(np.repeat(np.arange(len(rows)), count), tokens.ravel())
        self._drawn[rows], self._drawn_scores[rows] = tokens, scores.reshape(tokens.shape)

    def result(self) -> PromptScores:
        """What has been asked for, once every row has come."""
        request = self._request
        targets = request.target_prompt_tokens
        return PromptScores(
            Tensor.of(self._own) if request.prompt_logprobs else None,
            TopLogprobs(Tensor.of(self._best), Tensor.of(self._best_scores))
            if request.topk_prompt_logprobs
            else None,
            None if targets is None else targets.with_values(self._cell_scores),
            PromptAlternatives(Tensor.of(self._drawn), Tensor.of(self._drawn_scores))
            if request.prompt_alternatives
            else None,
        )
