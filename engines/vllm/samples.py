"""A sample request while vLLM draws it: one `Ask` for each sequence, and the result put together from their pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.interface import EngineInfo, SampleStep, Token
from engines.operations import SampledSequence, SampleRequest, SampleResult, encode
from engines.prompts import PromptScores, rows_wanted, score_prompt
from engines.sampling import Best, Decode, StopTracker, top_logprobs
from engines.tensors import Tensor
from engines.vllm.adapters import Place
from engines.vllm.asking import Ask, Piece, Scores
from engines.vllm.outputs import best_of

_NO_TOKENS = Tensor.of(np.zeros(0, dtype=np.int32))


@dataclass
class Growing:
    """One sequence under way."""

    stops: StopTracker
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Best] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None


class Sample:
    """A sample under way. Sequences are begun one by one, in their order."""

    def __init__(
        self, call_id: int, name: str, request: SampleRequest, info: EngineInfo, decode: Decode, party: str
    ) -> None:
        self.call_id = call_id
        self.name = name
        """What no other sample of this process is called."""
        self.party = party
        self.request = request
        self.begun = 0
        self.place: Place | None = None
        self._prompt: list[int] = request.prompt.array().tolist()
        room = info.max_context - len(self._prompt)
        self._limit = room if request.max_tokens is None else request.max_tokens
        self._stop_tokens = [*request.stop_tokens, *(info.eos_tokens if request.stop_at_eos else ())]
        self._sequences = [
            Growing(StopTracker(request, info.eos_tokens, decode)) for _ in range(request.num_samples)
        ]
        self._how = encode(_how_to_draw(request))
        self._cached = 0
        self._scores = PromptScores()

    @property
    def waiting(self) -> bool:
        """Whether sequences have not been begun yet."""
        return self.begun < len(self._sequences)

    @property
    def complete(self) -> bool:
        return all(sequence.stop_reason is not None for sequence in self._sequences)

    @property
    def drawn(self) -> list[int]:
        """The sequences that vLLM draws."""
        return [i for i in range(self.begun) if self._sequences[i].stop_reason is None]

    def next(self) -> tuple[int, Ask]:
        """The next sequence to begin. What the prompt says is asked of the first one."""
        request, index = self.request, self.begun
        self.begun += 1
        scored = index == 0 and (request.prompt_logprobs or request.topk_prompt_logprobs)
        ask = Ask(
            name=f"{self.name}-{index}",
            prompt=self._prompt,
            most_tokens=self._limit,
            stop_tokens=self._stop_tokens,
            top=request.topk_sample_logprobs,
            prompt_logprobs=request.topk_prompt_logprobs if scored else None,
            salt=request.session or self.name,
            adapter=self.place.adapter if self.place is not None else None,
            request=self._how,
            sequence=index,
        )
        return index, ask

    def take(self, index: int, piece: Piece) -> list[SampleStep]:
        """The steps that a piece is; what comes behind a sequence's end is left out."""
        sequence = self._sequences[index]
        if index == 0 and not sequence.tokens:
            self._cached = piece.cached_tokens
            if piece.prompt is not None:
                self._scores = _scores(self.request, piece.prompt)
        steps = []
        for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.tops, strict=True):
            if sequence.stop_reason is not None:
                break
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.tops.append(top)
            if sequence.stops.add(token):
                sequence.stop_reason = "stop"
            elif len(sequence.tokens) >= self._limit:
                sequence.stop_reason = "length"
            steps.append(SampleStep(self.call_id, index, Token(token, logprob, top), sequence.stop_reason))
        if piece.ended and sequence.stop_reason is None:
            raise RuntimeError(
                f"vLLM ended a sequence after {len(sequence.tokens)} of {self._limit} tokens, and nothing stops it"
            )
        return steps

    def result(self) -> SampleResult:
        """The result of a complete sample."""
        return SampleResult(
            sequences=[_finished(each, self.request) for each in self._sequences],
            prompt_cache_hit_tokens=self._cached,
            **self._scores._asdict(),
        )


def _how_to_draw(request: SampleRequest) -> SampleRequest:
    """What vLLM's process needs to know of a request: its randomness and what bends its distribution. It has the
    prompt."""
    return msgspec.structs.replace(
        request,
        prompt=_NO_TOKENS,
        stop_strings=(),
        stop_tokens=(),
        target_prompt_tokens=None,
        adapter=None,
        session="",
    )


def _finished(sequence: Growing, request: SampleRequest) -> SampledSequence:
    assert sequence.stop_reason is not None
    count = request.topk_sample_logprobs
    return SampledSequence(
        tokens=Tensor.of(np.array(sequence.tokens, dtype=np.int32)),
        logprobs=Tensor.of(np.array(sequence.logprobs, dtype=np.float32)),
        stop_reason=sequence.stop_reason,
        top_logprobs=top_logprobs(sequence.tops, count) if count else None,
    )


def _scores(request: SampleRequest, prompt: Sequence[Scores | None]) -> PromptScores:
    return score_prompt(request, _chunks(rows_wanted(request), prompt))


def _chunks(rows: NDArray[np.int64], prompt: Sequence[Scores | None]) -> Iterator[tuple[int, PromptChunk]]:
    """Row i is what is expected of token i + 1."""
    if len(rows):
        found = [prompt[row + 1] for row in rows.tolist()]
        yield len(rows), PromptChunk([scores or {} for scores in found])


class PromptChunk:
    """`engines.prompts.Chunk` on what vLLM tells: the prompt's own tokens and the best ones."""

    def __init__(self, rows: list[Scores]) -> None:
        self._rows = rows

    def at(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
        return np.array([self._rows[row][token] for row, token in pairs], dtype=np.float32)

    def best(self, first: int, count: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
        best = [best_of(scores, count) for scores in self._rows[first:]]
        tokens = np.array([[token for token, _ in pairs] for pairs in best], dtype=np.int64)
        return tokens, np.array([[score for _, score in pairs] for pairs in best], dtype=np.float32)

    def draw(self, temperature: float, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        raise NotImplementedError("requests that draw in a prompt are refused: EngineInfo.any_prompt_token")
