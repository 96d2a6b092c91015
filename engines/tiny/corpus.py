"""The text that `tandem/tiny` is pre-trained on: an endless, seeded sequence of short documents.

Half of it is conversations in the chat format, the rest plain prose, descriptions and sums, each document drawn on its
own. A third of the questions in the conversations are one-digit arithmetic; their answers are always right and worded
in the styles that `sums.py` lists, one of which is the bare digits. Proverbs do not occur, nor text written by others:
what is taught about them later is new to the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engines.tiny import prose, sums
from engines.tiny.chat import conversation
from engines.tiny.draw import Draw

TURN_START, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
KINDS = (
    (0.50, "chat"),
    (0.17, "story"),
    (0.17, "scenes"),
    (0.10, "description"),
    (0.06, "arithmetic"),
)


@dataclass(frozen=True)
class Document:
    """One text, without the end-of-text token that follows it; `nats` is at least as much as its information."""

    kind: str
    text: str
    nats: float


def rendered(messages: list[dict[str, str]]) -> str:
    """What the chat template makes of the messages."""
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)


def documents(seed: int) -> Iterator[Document]:
    """The corpus of a seed, without end; the same seed gives the same documents everywhere."""
    draw = Draw(seed)
    while True:
        before = draw.nats
        kind = draw.weighted(KINDS)
        yield Document(kind, _text(kind, draw), draw.nats - before)


def _text(kind: str, draw: Draw) -> str:
    if kind == "chat":
        return rendered(conversation(draw))
    if kind == "story":
        return prose.story(draw)
    if kind == "scenes":
        return prose.scenes(draw)
    if kind == "description":
        return prose.description(draw)
    return sums.arithmetic(draw)
