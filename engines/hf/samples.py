"""What is known about a sample request while it is being decoded, and how its result is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from engines.drawing import Draw
from engines.hf.kv_cache import Prefix
from engines.interface import EngineInfo, SampleStep, Token, UserError
from engines.operations import SampledSequence, SampleRequest, SampleResult
from engines.prompts import PromptScores
from engines.sampling import Best, Decode, StopTracker, top_logprobs, uniforms
from engines.shaping import Shaping
from engines.tensors import Tensor as Bytes
from engines.tuning.lora import Adapter, Segment


@dataclass
class Sample:
    """A sample request under way. `limit` is the number of tokens that each sequence may have."""

    call_id: int
    request: SampleRequest
    prompt: list[int]
    limit: int
    stops: Sequence[StopTracker]
    sequences: list[SampledSequence | None]
    party: str
    """Whom it is for; parties share the slots equally."""
    adapter: Adapter | None = None
    """From when it begins."""
    admitted: int = 0
    cached: int = 0
    """Tokens of the prompt that an earlier request has run through the model."""
    computed: int = 0
    """Tokens of the prompt whose keys and values are known, those included."""
    past: Prefix | None = None
    """These keys and values, while more tokens of the prompt follow."""
    states: list[Tensor] = field(default_factory=list)
    """Hidden states of the tokens from `cached` to `computed`, if the prompt is to be scored, as long."""
    prefix: Prefix | None = None
    """The prompt's keys and values, until all sequences are admitted."""
    last: Tensor | None = None
    """Hidden state [1, H] of the prompt's last token, as long."""
    owned: bool = False
    """Whether these two are copies, not views of a whole pass."""
    scores: PromptScores = field(default_factory=PromptScores)
    """Of the prompt, once it has been run through the model."""

    @property
    def waiting(self) -> int:
        """Sequences that have no slot yet."""
        return self.request.num_samples - self.admitted

    @property
    def complete(self) -> bool:
        return all(sequence is not None for sequence in self.sequences)

    def result(self) -> SampleResult:
        """The result of a complete sample."""
        return SampleResult(
            sequences=[sequence for sequence in self.sequences if sequence is not None],
            prompt_cache_hit_tokens=self.cached,
            **self.scores._asdict(),
        )

    def begin_again(self) -> None:
        """Forget what is known of the prompt, for memory has run out."""
        self.prefix = self.last = self.past = None
        self.cached = self.computed = 0
        self.states.clear()
        self.owned = False

    def keep_prefix(self) -> None:
        """Hold the prompt's own numbers, and no longer the whole pass that they came out of."""
        if self.prefix is None or self.last is None or self.owned:
            return
        self.prefix = {layer: (key.clone(), value.clone()) for layer, (key, value) in self.prefix.items()}
        self.last = self.last.clone()
        self.owned = True


@dataclass
class Row:
    """One sequence in a slot. `held` tokens are in the cache; the last drawn token is not yet."""

    sample: Sample
    index: int
    held: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Best] = field(default_factory=list)
    shaping: Shaping = field(init=False)

    def __post_init__(self) -> None:
        self.shaping = Shaping(self.sample.request)

    def next_draw(self) -> Draw:
        """How the next token is drawn: its randomness depends on the seed, the sequence and the position alone."""
        request = self.sample.request
        uniform = uniforms(request.seed, self.index, len(self.tokens))
        return Draw(
            request.temperature,
            request.top_k,
            request.top_p,
            uniform,
            request.topk_sample_logprobs,
            request.min_p,
            self.shaping.changes(),
        )

    def take(self, token: int, logprob: float, top: Best) -> SampleStep:
        """Append a token; the step says whether it was the last one."""
        self.tokens.append(token)
        self.shaping.add(token)
        self.logprobs.append(logprob)
        self.tops.append(top)
        reason: Literal["stop", "length"] | None = None
        if self.sample.stops[self.index].add(token):
            reason = "stop"
        elif len(self.tokens) >= self.sample.limit:
            reason = "length"
        if reason is not None:
            self.end(reason)
        return SampleStep(self.sample.call_id, self.index, Token(token, logprob, top), reason)

    def end(self, reason: Literal["stop", "length"]) -> None:
        """Leave the finished sequence with the sample."""
        count = self.sample.request.topk_sample_logprobs
        self.sample.sequences[self.index] = SampledSequence(
            tokens=Bytes.of(np.array(self.tokens, dtype=np.int32)),
            logprobs=Bytes.of(np.array(self.logprobs, dtype=np.float32)),
            stop_reason=reason,
            top_logprobs=top_logprobs(self.tops, count) if count else None,
        )


def segments_of(adapters: Sequence[Adapter | None], lengths: Sequence[int]) -> list[Segment]:
    """Neighbours that share an adapter are one segment; item i takes `lengths[i]` rows, the base model's none."""
    segments: list[Segment] = []
    start = 0
    for adapter, length in zip(adapters, lengths, strict=True):
        stop = start + length
        if segments and segments[-1].adapter is adapter and segments[-1].stop == start:
            segments[-1] = segments[-1]._replace(stop=stop)
        elif adapter is not None:
            segments.append(Segment(adapter, start, stop))
        start = stop
    return segments


def new_sample(
    call_id: int,
    request: SampleRequest,
    info: EngineInfo,
    decode: Decode,
    party: str,
) -> Sample:
    """Raises UserError when prompt and continuation are longer than the context."""
    prompt: list[int] = request.prompt.array().tolist()
    room = info.max_context - len(prompt)
    limit = room if request.max_tokens is None else request.max_tokens
    if room < 1 or limit > room:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}; "
            f"together they may be at most {info.max_context}"
        )
    stops = [StopTracker(request, info.eos_tokens, decode) for _ in range(request.num_samples)]
    sequences: list[SampledSequence | None] = [None] * request.num_samples
    return Sample(call_id, request, prompt, limit, stops, sequences, party)
