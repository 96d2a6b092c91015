"""What clients write that is stored as they wrote it: names and metadata.

Each check raises ValueError with a sentence; in a struct's `__post_init__` it becomes part of the decoder's error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._=+@-]{1,200}")
_LARGEST = 16_384
_DEEPEST = 20
_ECHO = 80


def require_name(field: str, name: str) -> None:
    """The name of a checkpoint: a segment of its tinker:// path."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field} is {name[:_ECHO]!r}; the name of a checkpoint is 1 to 200 letters, digits or characters of "
            "._=+@- and neither . nor .."
        )


def require_storable(field: str, value: object) -> None:
    """Text, or objects and lists of it: small, not nested deeply, without NUL, which PostgreSQL cannot hold."""
    for level, text in _texts(value):
        if level > _DEEPEST:
            raise ValueError(f"{field} is nested too deeply; at most {_DEEPEST} levels are kept")
        if "\0" in text:
            raise ValueError(f"{field} holds a NUL character, which cannot be stored")
    size = len(msgspec.json.encode(value))
    if size > _LARGEST:
        raise ValueError(f"{field} takes {size} bytes as JSON; at most {_LARGEST} are kept")


def _texts(value: object) -> Iterator[tuple[int, str]]:
    """Every text of a value with the level it stands at, and an empty one for each level; level by level."""
    level, current = 0, [value]
    while current:
        yield level, ""
        inner: list[object] = []
        for item in current:
            if isinstance(item, str):
                yield level, item
            elif isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
        level, current = level + 1, inner
