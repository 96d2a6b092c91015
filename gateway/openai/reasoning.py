"""What a model thinks, told from what it says: text between `<think>` and `</think>` at the head of an answer."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

OPEN = "<think>"
CLOSE = "</think>"


class Thinking(Enum):
    """How the answers to a prompt begin, as far as its chat template knows."""

    NEVER = auto()  # the template knows no thinking: the text is left alone
    MAYBE = auto()  # the model may begin with <think>
    OPENED = auto()  # the prompt ends with <think>: the answer begins inside

    @classmethod
    def of(cls, template: str, prompt: str) -> Thinking:
        """For the source of a chat template and a prompt that it has rendered."""
        if CLOSE not in template and OPEN not in template:
            return cls.NEVER
        return cls.OPENED if prompt.rstrip().endswith(OPEN) else cls.MAYBE


class Parted(NamedTuple):
    """New text of both kinds."""

    reasoning: str
    content: str


class ReasoningSplit:
    """Parts the text of one answer as it comes. Newlines around the thoughts and the tags themselves are left out.

    What may turn out to be the beginning of a tag, or of the newlines before one, is held back.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._inside = thinking is Thinking.OPENED
        self._before = thinking is Thinking.MAYBE
        self._at_start = self._inside
        """Whether newlines that come now are those behind a tag."""
        self._held = ""

    def feed(self, text: str) -> Parted:
        """What has become certain."""
        self._held += text
        if self._before and not self._begun():
            return Parted("", "")
        if not self._inside:
            return Parted("", self._content())
        thoughts, tag, rest = self._held.partition(CLOSE)
        if not tag:
            return Parted(self._thoughts(), "")
        reasoning = self._stripped(thoughts).rstrip("\n")
        self._inside, self._at_start, self._held = False, True, rest
        return Parted(reasoning, self._content())

    def finish(self) -> Parted:
        """What was held back; no more text comes."""
        held, self._held = self._held, ""
        return Parted(self._stripped(held.rstrip("\n")), "") if self._inside else Parted("", held)

    def _begun(self) -> bool:
        """Whether it is certain now how the answer begins."""
        beginning = self._held.lstrip()
        if len(beginning) < len(OPEN) and OPEN.startswith(beginning):
            return False
        self._before = False
        if beginning.startswith(OPEN):
            self._inside = self._at_start = True
            self._held = beginning.removeprefix(OPEN)
        return True

    def _thoughts(self) -> str:
        certain = self._held
        cut = next((n for n in range(len(CLOSE) - 1, 0, -1) if certain.endswith(CLOSE[:n])), 0)
        certain = certain[: len(certain) - cut].rstrip("\n")
        self._held = self._held[len(certain) :]
        return self._stripped(certain)

    def _content(self) -> str:
        content, self._held = self._stripped(self._held), ""
        return content

    def _stripped(self, text: str) -> str:
        """Without the newlines behind a tag."""
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return text
