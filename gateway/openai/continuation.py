"""One choice while its tokens arrive: the text that may be shown, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engines.operations import SampledSequence, SampleResult, TopLogprobs
from gateway.openai.plan import Plan
from gateway.openai.reasoning import CLOSE, OPEN, Parted, ReasoningSplit, Thinking

Finish = Literal["stop", "length"]
Alternatives = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What is new in one choice: text, and tokens with their log-probs (None: unknown) and the offset in the
    choice's text at which each begins. `top` holds the best alternatives at each token, when they were asked for.

    `finish` comes with the last piece. `prompt_tokens` counts the tokens at the head that are the echoed prompt.
    `reasoning` is new text of the model's thoughts, which `text` is without.
    """

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float | None]
    offsets: list[int]
    top: list[Alternatives]
    finish: Finish | None = None
    prompt_tokens: int = 0
    reasoning: str = ""


class StopCut:
    """Ends a text before the first of some strings, holding back what may turn out to be the beginning of one.

    Hidden text takes part in that and is not shown: a stop string may hold special tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._hidden: list[bool] = []
        self.found = False

    def feed(self, text: str, *, hidden: bool = False) -> str:
        """The text that is certain to come before any stop string."""
        if self.found or not text:
            return ""
        self._held += text
        self._hidden += [hidden] * len(text)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._released(min(places))
        return self._released(
            len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        )

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        return "" if self.found else self._released(len(self._held))

    def _released(self, length: int) -> str:
        text, hidden = self._held[:length], self._hidden[:length]
        self._held, self._hidden = self._held[length:], self._hidden[length:]
        if not any(hidden):
            return text
        return "".join(character for character, unseen in zip(text, hidden, strict=True) if not unseen)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Continuation:
    """Text and log-probs of one choice. What ends it stays among its tokens, and is not in its text."""

    def __init__(self, plan: Plan, choice: int, offset: int) -> None:
        """`offset` is the length of the text that stands before: the echoed prompt."""
        self._text = plan.target.text
        self._decoder = self._text.decoder(skip_special_tokens=False)
        self._hides_special = plan.skip_special_tokens
        self._cut = StopCut(plan.stops)
        self._split = None if plan.thinking is Thinking.NEVER else ReasoningSplit(plan.thinking)
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
            shown.append(self._shown(token))
        self.fed += len(tokens)
        if stop_reason is not None:
            self.finished = True
            shown += [self._cut.feed(self._decoder.finish()), self._cut.finish()]
        finish: Finish | None = "stop" if stop_reason and self._cut.found else stop_reason
        said = self._parted("".join(shown))
        return Piece(
            self._choice,
            said.content,
            list(tokens),
            list(logprobs),
            offsets,
            list(top),
            finish,
            reasoning=said.reasoning,
        )

    def _parted(self, text: str) -> Parted:
        """Thoughts and answer; at the end of the sequence all that was held back."""
        if self._split is None:
            return Parted("", text)
        found = self._split.feed(text)
        rest = self._split.finish() if self.finished else Parted("", "")
        return Parted(found.reasoning + rest.reasoning, found.content + rest.content)

    def _shown(self, token: int) -> str:
        if self._hides_special and self._text.is_special(token):
            spelled = self._text.token_bytes(token).decode(errors="replace")
            if self._split is None or spelled not in (OPEN, CLOSE):
                return self._cut.feed(spelled, hidden=True)
        text = self._decoder.feed([token])
        self._offset += len(text)
        return self._cut.feed(text)

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
