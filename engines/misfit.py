"""What msgspec says of a value that does not fit, in the words of who has sent it."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import msgspec

_SAID = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<where>[^`]*)`)?", re.DOTALL)
_FIELD = re.compile(r"field `([^`]*)`")
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")
LOOKS_S = 0.05
"""Seconds for which the entry that is wrong is looked for. A look takes as long as reading the whole, which of a large
body must not happen again and again."""
_ECHO = 80
"""Characters of a sender's own name that an error repeats."""


class Misfit(NamedTuple):
    """What is wrong with the value at `path`, which may be that it lacks a `field` or has one too many."""

    what: str
    path: str
    field: str = ""

    @property
    def where(self) -> str:
        """The field as its sender has written it; empty: the whole."""
        return ".".join(part for part in (self.path, self.field) if part)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def misfit_of(error: msgspec.DecodeError, whole: str = "") -> Misfit:
    """What an error says, of a value that its sender calls `whole`. A mapping's entries have no name in it: `[...]`."""
    match = _SAID.fullmatch(str(error))
    what, path = (match["what"], match["where"] or "") if match is not None else (str(error), "")
    field = _FIELD.search(what)
    return Misfit(what, (whole + path).removeprefix("."), "" if field is None else field[1][:_ECHO])


def with_entries(misfit: Misfit, value: Any, schema: type[Any]) -> Misfit:
    """The same with the names of a mapping's entries, unless they take too long to find. `value` was to become a
    `schema`; it is used up.

    What comes before and after the place is left out of it step by step, until one entry is left that gives the error.
    """
    path, rest = "", f".{misfit.path}"
    here = value
    deadline = time.monotonic() + LOOKS_S
    while "[...]" in rest and (step := _STEP.match(rest)) is not None:
        if step["field"] is not None:
            here, told = here[step["field"]], step[0]
        elif step["index"] is not None:
            here[:] = [here[int(step["index"])]]
            here, told = here[0], step[0]
        else:
            name = _wrong_entry(here, value, schema, deadline)
            if name is None:
                break
            here, told = here[name], f"[{name[:_ECHO]!r}]"
        path, rest = path + told, rest[step.end() :]
    return misfit._replace(path=(path + rest).removeprefix("."))


def _wrong_entry(entries: dict[str, Any], value: Any, schema: type[Any], deadline: float) -> str | None:
    """The entry that the error is about, the first that does not fit; it is the only one left. Found by halving, for
    there may be many; None when the time is over."""
    first, items = _said(value, schema), list(entries.items())
    fitting, most = 0, len(items)
    while most - fitting > 1:
        if time.monotonic() > deadline:
            return None
        middle = (fitting + most) // 2
        entries.clear()
        entries.update(items[:middle])
        if _said(value, schema) == first:
            most = middle
        else:
            fitting = middle
    entries.clear()
    entries.update(items[most - 1 : most])
    return items[most - 1][0]


def _said(value: Any, schema: type[Any]) -> str | None:
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        return str(error)
    return None
