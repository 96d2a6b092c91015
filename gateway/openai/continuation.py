"""One choice while its tokens arrive: the text that may be shown, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines.operations import SampledSequence, SampleResult, TopLogprobs
from gateway.openai.plan import Plan

Finish = Literal["stop", "length"]
Alternatives = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What is new in one choice: text, and tokens with their log-probs (None: unknown) and the offset in the
    choice's text at which each begins. `top` holds the best alternatives at each token, when they were asked for.

    `finish` comes with the last piece. `prompt_tokens` counts the tokens at the head that are the echoed prompt.
    """

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float | None]
    offsets: list[int]
    top: list[Alternatives]
    finish: Finish | None = None
    prompt_tokens: int = 0


class StopCut:
    """Ends a text before the first of some strings, holding back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Continuation:
    """Text and log-probs of one choice. What ends it stays among its tokens, and is not in its text."""

    def __init__(self, plan: Plan, choice: int, offset: int) -> None:
        """`offset` is the length of the text that stands before: the echoed prompt."""
        self._decoder = plan.target.text.decoder(skip_special_tokens=plan.skip_special_tokens)
        self._cut = StopCut(plan.stops)
        self._eos = frozenset(plan.target.info.eos_tokens)
        self._choice = choice
        self._offset = offset
        self.fed = 0
        self.finished = False

    def feed(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[Alternatives],
        stop_reason: Finish | None,
    ) -> Piece:
        """What these tokens add; `stop_reason` comes with the last ones."""
        offsets: list[int] = []
        shown: list[str] = []
        ended_by_eos = stop_reason == "stop" and bool(tokens) and tokens[-1] in self._eos
        for position, token in enumerate(tokens):
            offsets.append(self._offset)
            if ended_by_eos and position == len(tokens) - 1:
                continue
            text = self._decoder.feed([token])
            self._offset += len(text)
            shown.append(self._cut.feed(text))
        self.fed += len(tokens)
        if stop_reason is not None:
            self.finished = True
            shown += [self._cut.feed(self._decoder.finish()), self._cut.finish()]
        finish: Finish | None = "stop" if stop_reason and self._cut.found else stop_reason
        text = "".join(shown)
        return Piece(self._choice, text, list(tokens), list(logprobs), offsets, list(top), finish)

    def rest(self, sequence: SampledSequence) -> Piece:
        """What a complete sequence adds to the tokens that have come already."""
        tokens = sequence.tokens.array().tolist()[self.fed :]
        logprobs = sequence.logprobs.array().tolist()[self.fed :]
        top = alternatives(sequence.top_logprobs)[self.fed :]
        return self.feed(tokens, logprobs, top, sequence.stop_reason)


def alternatives(top: TopLogprobs | None) -> list[Alternatives]:
    """The best tokens of each position with their log-probs, best first; [] when they were not asked for."""
    if top is None:
        return []
    pairs = zip(top.tokens.array().tolist(), top.logprobs.array().tolist(), strict=True)
    return [list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in pairs]


class Echo:
    """The prompt as the head of a choice's text, with its log-probs once they are known."""

    def __init__(self, plan: Plan, index: int) -> None:
        """For prompt number `index`. A prompt that was sent as text is shown as it was sent."""
        prompt = plan.prompts[index]
        decoder = plan.target.text.decoder(skip_special_tokens=plan.skip_special_tokens, at_start=True)
        self._tokens = prompt.tokens
        self._offsets: list[int] = []
        length, parts = 0, list[str]()
        for token in prompt.tokens:
            self._offsets.append(length)
            parts.append(decoder.feed([token]))
            length += len(parts[-1])
        self.text = prompt.text if prompt.text is not None else "".join(parts) + decoder.finish()

    def piece(self, choice: int, result: SampleResult | None) -> Piece:
        """The first piece of a choice; without a result there are no tokens in it, only text."""
        if result is None or result.prompt_logprobs is None:
            return Piece(choice, self.text, [], [], [], [])
        # The first token of a prompt follows nothing, so it has no log-prob.
        logprobs = [None, *result.prompt_logprobs.array().tolist()[1:]]
        top = alternatives(result.topk_prompt_logprobs)
        tokens = self._tokens
        return Piece(choice, self.text, tokens, logprobs, self._offsets, top, prompt_tokens=len(tokens))
