"""Prompts on their way into the batch: each is run through the model once, a long one in pieces, a piece a step.

Between two pieces the running sequences get their next token, and shorter prompts join: nobody waits for the whole of
somebody's long prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.hf.kv_cache import PrefillLayout, Prefix
from engines.hf.model import BaseModel
from engines.hf.prompt_cache import LARGEST_MASK, Key, PromptCache
from engines.hf.prompts import scores_of
from engines.hf.samples import Sample, segments_of
from engines.prompts import first_token_needed, rows_wanted


class Prefill:
    """Gives samples their prompts' numbers: `prefix`, `last` and `scores`.

    `most` are the tokens of one step; a prompt that has more left is run in pieces. With `one_by_one` each prompt makes
    passes of its own, whose sizes depend on nothing else.
    """

    def __init__(self, base: BaseModel, most: int, one_by_one: bool, prompts: PromptCache) -> None:
        self.base = base
        self.most = most
        self.one_by_one = one_by_one
        self.prompts = prompts
        self.long: Sample | None = None
        """The sample whose prompt is being run in pieces."""

    def is_long(self, sample: Sample) -> bool:
        """Whether the rest of a sample's prompt takes more than one step."""
        return _left(sample) > self.most

    def advance(self) -> Sample | None:
        """Run a piece of the long prompt; gives its sample when the rest fits into a step."""
        sample = self.long
        if sample is None:
            return None
        if sample.past is None:
            sample.cached, sample.past = self._recall(sample)
            sample.computed = sample.cached
        piece = max(1, min(self.most // 2, LARGEST_MASK // len(sample.prompt)))
        if _left(sample) > piece:
            self._run([sample], [sample.computed + piece])
        if _left(sample) > piece:
            return None
        self.long = None
        return sample

    def forget(self, call_id: int) -> None:
        """A sample is over."""
        if self.long is not None and self.long.call_id == call_id:
            self.long = None

    def run(self, samples: Sequence[Sample]) -> None:
        """Run what is left of each prompt."""
        for sample in samples:
            if sample.past is None:
                sample.cached, sample.past = self._recall(sample)
                sample.computed = sample.cached
        packs = [[sample] for sample in samples] if self.one_by_one else [samples] if samples else []
        for pack in packs:
            self._run(pack, [len(sample.prompt) for sample in pack])

    def _run(self, samples: Sequence[Sample], stops: Sequence[int]) -> None:
        """One pass, which brings each prompt up to its stop."""
        starts = [sample.computed for sample in samples]
        pieces = [
            sample.prompt[start:stop] for sample, start, stop in zip(samples, starts, stops, strict=True)
        ]
        lengths = [len(piece) for piece in pieces]
        layout = PrefillLayout(lengths, [sample.past for sample in samples])
        segments = segments_of([sample.adapter for sample in samples], lengths)
        hidden = self.base.hidden(self.base.pack(pieces, starts), layout, segments)
        first = 0
        for sample, length in zip(samples, lengths, strict=True):
            own = slice(first, first + length)
            self._take(sample, length, layout.prefix(own.start, own.stop), hidden[own])
            first += length

    def _take(self, sample: Sample, length: int, prefix: Prefix, hidden: Tensor) -> None:
        """Give a sample the numbers of its next tokens, whose states are `hidden` [length, H]."""
        sample.computed += length
        if sample.computed < len(sample.prompt):
            sample.past = prefix
            if len(rows_wanted(sample.request)):
                sample.states.append(hidden)
            return
        sample.prefix, sample.past = prefix, None
        sample.last = hidden[-1:]
        states = torch.cat([*sample.states, hidden]) if sample.states else hidden
        sample.states.clear()
        sample.scores = scores_of(
            sample.request, self.base.unembedding, states, sample.adapter, sample.cached
        )
        if sample.request.session:
            self.prompts.keep(_key(sample), sample.prompt, prefix)

    def _recall(self, sample: Sample) -> tuple[int, Prefix | None]:
        """How many tokens begin a prompt that is known already, short of the first one whose state is needed, and their
        numbers."""
        if not sample.request.session:
            return 0, None
        return self.prompts.find(_key(sample), sample.prompt, first_token_needed(sample.request))


def _left(sample: Sample) -> int:
    return len(sample.prompt) - sample.computed


def _key(sample: Sample) -> Key:
    adapter = sample.request.adapter
    return sample.request.session, "" if adapter is None else adapter.folder
