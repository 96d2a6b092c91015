"""The scores of a prompt from its hidden states, the logits of a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.drawing import invert
from engines.hf.logprobs import Unembedding
from engines.operations import SampleRequest
from engines.prompts import PromptScores, rows_wanted, score_prompt
from engines.tuning.lora import Adapter, Segment


def scores_of(
    request: SampleRequest, unembedding: Unembedding, hidden: Tensor, adapter: Adapter | None, first: int = 0
) -> PromptScores:
    """What a request asks about its prompt; only rows that it needs get logits.

    `hidden` are the states [N - first, H] of the prompt's tokens from `first` on; no row before it may be needed.
    """
    return score_prompt(request, _chunks(rows_wanted(request) - first, unembedding, hidden, adapter))


def _chunks(
    rows: NDArray[np.int64], unembedding: Unembedding, hidden: Tensor, adapter: Adapter | None
) -> Iterator[tuple[int, TorchChunk]]:
    if not len(rows):
        return
    states = hidden[_index(rows, hidden)]
    segments = [] if adapter is None else [Segment(adapter, 0, len(rows))]
    for _, logits in unembedding.chunks(states, segments):
        yield logits.shape[0], TorchChunk(logits.log_softmax(1))


class TorchChunk:
    """`engines.prompts.Chunk` on log-probs float32 [R, V]."""

    def __init__(self, logprobs: Tensor) -> None:
        self._logprobs = logprobs

    def at(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        where = (_index(rows, self._logprobs), _index(tokens, self._logprobs))
        found: NDArray[np.float32] = self._logprobs[where].cpu().numpy()
        return found

    def best(self, first: int, count: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
        top = self._logprobs[first:].topk(count, dim=1)
        return top.indices.cpu().numpy(), top.values.cpu().numpy()

    def draw(self, temperature: float, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        if temperature == 0:
            tokens = self._logprobs.argmax(dim=1, keepdim=True).expand(-1, uniforms.shape[1])
        else:
            scores = self._logprobs if temperature == 1 else (self._logprobs / temperature).log_softmax(1)
            tokens = invert(scores.exp(), torch.from_numpy(uniforms).to(scores.device))
        found: NDArray[np.int64] = tokens.cpu().numpy()
        return found


def _index(places: NDArray[np.int64], beside: Tensor) -> Tensor:
    return torch.from_numpy(places).to(beside.device)
