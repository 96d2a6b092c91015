"""What clients write that is stored as they wrote it: metadata.

The check raises ValueError with a sentence; in a struct's `__post_init__` it becomes part of the decoder's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

_LARGEST = 16_384
_DEEPEST = 20


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


def texts_of(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata as the SDK reads it, which is text only: one number would break a whole listing. What is no text is
    shown as JSON; a search finds numbers, true, false and null in this form too."""
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in metadata.items()
    }


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
