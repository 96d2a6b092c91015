"""Sampling: each sample is a small batch of its own, one row for each of its sequences, one token a step."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.fake.drawing import draw
from engines.fake.model import Adapter, Weights, log_softmax, logits_of, run_layers, states_of
from engines.fake.tokenizer import decode
from engines.interface import EngineInfo, SampleEnd, SampleEvent, SampleStep, Token
from engines.operations import SampledSequence, SampleRequest, SampleResult
from engines.prompts import PromptScores, rows_wanted, score_prompt
from engines.sampling import StopTracker, top_logprobs, uniforms
from engines.shaping import Shaping
from engines.tensors import Tensor

Array = NDArray[Any]


class Sequence:
    """One continuation under way."""

    def __init__(self, index: int, request: SampleRequest, eos_tokens: tuple[int, ...]) -> None:
        self.index = index
        self.drawn: list[Token] = []
        self.stop_reason: Literal["stop", "length"] | None = None
        self._request = request
        self._stops = StopTracker(request, eos_tokens, decode)
        self._shaping = Shaping(request)

    def take(self, logits: Array, limit: int) -> Token:
        """Draw the next token from logits [V]."""
        uniform = uniforms(self._request.seed, self.index, len(self.drawn))
        token = draw(logits, self._request, uniform, self._shaping.changes())
        self.drawn.append(token)
        self._shaping.add(token.token)
        if self._stops.add(token.token):
            self.stop_reason = "stop"
        elif len(self.drawn) >= limit:
            self.stop_reason = "length"
        return token

    def result(self) -> SampledSequence:
        """The finished continuation."""
        count = self._request.topk_sample_logprobs
        return SampledSequence(
            tokens=Tensor.of(np.array([token.token for token in self.drawn], dtype=np.int32)),
            logprobs=Tensor.of(np.array([token.logprob for token in self.drawn], dtype=np.float32)),
            stop_reason=self.stop_reason or "length",
            top_logprobs=top_logprobs([token.top for token in self.drawn], count) if count else None,
        )


class Sample:
    """A sample request under way."""

    def __init__(
        self,
        call_id: int,
        request: SampleRequest,
        adapter: Adapter | None,
        weights: Weights,
        info: EngineInfo,
    ) -> None:
        self.call_id = call_id
        self.request = request
        self.adapter = adapter
        self.weights = weights
        self.prompt: Array = request.prompt.array()
        room = info.max_context - len(self.prompt)
        self.limit = room if request.max_tokens is None else min(room, request.max_tokens)
        self.sequences = [Sequence(index, request, info.eos_tokens) for index in range(request.num_samples)]
        self.live = self.sequences if self.limit > 0 else []
        self._states = states_of(weights, adapter, self.prompt)
        self._sums = np.repeat(weights.embed[self.prompt].cumsum(axis=0)[-1:], len(self.live), axis=0)

    def advance(self) -> list[SampleEvent]:
        """The next token of each live sequence; the end with the last one."""
        events: list[SampleEvent] = []
        if self.live:
            for sequence, row in zip(self.live, self._next_logits(), strict=True):
                token = sequence.take(row, self.limit)
                events.append(SampleStep(self.call_id, sequence.index, token, sequence.stop_reason))
            staying = [sequence.stop_reason is None for sequence in self.live]
            self._sums = self._sums[staying]
            self.live = [sequence for sequence in self.live if sequence.stop_reason is None]
        if not self.live:
            events.append(SampleEnd(self.call_id, self._result()))
        return events

    def _next_logits(self) -> Array:
        """[n, V] for the n live sequences: after the prompt, or after the newest token of each."""
        drawn = len(self.live[0].drawn)
        if not drawn:
            return np.repeat(
                logits_of(self.weights, self.adapter, self._states.y[-1:]), len(self.live), axis=0
            )
        embedded = self.weights.embed[[sequence.drawn[-1].token for sequence in self.live]]
        self._sums += embedded
        mean = self._sums / np.float32(len(self.prompt) + drawn)
        return logits_of(self.weights, self.adapter, run_layers(self.weights, self.adapter, embedded, mean).y)

    def _result(self) -> SampleResult:
        sequences = [sequence.result() for sequence in self.sequences]
        return SampleResult(sequences, **self._scores()._asdict())

    def _scores(self) -> PromptScores:
        """What the request asks about its prompt, all rows at once."""
        rows = rows_wanted(self.request)
        if not len(rows):
            return score_prompt(self.request, ())
        logprobs = log_softmax(logits_of(self.weights, self.adapter, self._states.y[rows]))
        return score_prompt(self.request, [(len(rows), ArrayChunk(logprobs))])


class ArrayChunk:
    """`engines.prompts.Chunk` on log-probs [R, V]."""

    def __init__(self, logprobs: Array) -> None:
        self._logprobs = logprobs

    def at(self, rows: Array, tokens: Array) -> Array:
        found: Array = self._logprobs[rows, tokens]
        return found

    def best(self, first: int, count: int) -> tuple[Array, Array]:
        own = self._logprobs[first:]
        order = np.argsort(-own, axis=1, kind="stable")[:, :count]
        return order, np.take_along_axis(own, order, axis=1)

    def draw(self, temperature: float, uniforms: Array) -> Array:
        if temperature == 0:
            return np.repeat(self._logprobs.argmax(axis=1)[:, None], uniforms.shape[1], axis=1)
        scores = self._logprobs.astype(np.float64) / temperature
        cumulative = np.exp(scores - scores.max(axis=1, keepdims=True)).cumsum(axis=1)
        total = cumulative[:, -1:]
        wanted = np.minimum(uniforms * total, np.nextafter(total, 0.0))
        pairs = zip(cumulative, wanted, strict=True)
        return np.stack([np.searchsorted(row, places, side="right") for row, places in pairs])
