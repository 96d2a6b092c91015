"""How the command line shows things: a table where one fits, else an entry of two lines; ids are never cut.

Text goes through `rich` as it is: an id such as `…:train:0` holds what rich would read as an emoji.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_GAP = "  "
_DOT = " · "
_COLOURS = {
    **dict.fromkeys(("active", "done", "open", "ready"), "green"),
    **dict.fromkeys(("creating", "queued", "running", "starting", "waiting"), "yellow"),
    **dict.fromkeys(("down", "failed"), "red"),
    **dict.fromkeys(("finished", "silent", "stopped", "unloaded"), "dim"),
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, how its value reads in a line of several (`rank {}`), and its side."""

    title: str
    inline: str = "{}"
    right: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one thing, its id first; empty ones are not shown in a line. `note` is what went wrong with it."""

    cells: tuple[str, ...]
    note: str | None = None


def console_of(width: int | None = None, terminal: bool | None = None) -> Console:
    """Standard output; the width and whether it is a terminal are found out unless given."""
    return Console(emoji=False, markup=False, highlight=False, width=width, force_terminal=terminal)


def show_rows(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """A list. What is not read in a terminal gets the table, one line for each thing."""
    widths = [
        max(cell_len(text) for text in (column.title, *(row.cells[index] for row in rows)))
        for index, column in enumerate(columns)
    ]
    if console.is_terminal and sum(widths) + len(_GAP) * (len(widths) - 1) > console.width:
        _show_entries(console, columns, rows)
    else:
        _show_table(console, columns, rows, widths)


def show_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Names and values of one thing. A value for which the rest of the line is too short gets the next one."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        head = f"{name:<{width}}{_GAP}"
        if console.is_terminal and len(head) + cell_len(value) > console.width:
            head = f"{name}\n{_GAP}"
        console.print(Text.assemble((head, "dim"), _coloured(value)), soft_wrap=True)


def _show_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Row], widths: Sequence[int]
) -> None:
    head = [_padded(column.title, width, column.right) for column, width in zip(columns, widths, strict=True)]
    console.print(Text(_GAP.join(head).rstrip(), style="bold"), soft_wrap=True)
    for row in rows:
        cells = zip(row.cells, columns, widths, strict=True)
        texts = [_padded(cell, width, column.right) for cell, column, width in cells]
        line = Text(_GAP).join(_coloured(text) for text in texts)
        line.rstrip()
        console.print(line, soft_wrap=True)
        _show_note(console, row.note)


def _show_entries(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    for row in rows:
        console.print(Text(row.cells[0], style="bold"), soft_wrap=True)
        cells = list(zip(row.cells, columns, strict=True))[1:]
        for line in _lines([_coloured(cell, column.inline) for cell, column in cells if cell], console.width):
            console.print(line, soft_wrap=True)
        _show_note(console, row.note)


def _lines(parts: Sequence[Text], width: int) -> list[Text]:
    """The parts, indented and with dots between them, in as many lines as they need; none is broken."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(_DOT) + part.cell_len <= width:
            lines[-1].append(_DOT, style="dim").append_text(part)
        else:
            lines.append(Text(_GAP).append_text(part))
    return lines


def _show_note(console: Console, note: str | None) -> None:
    """Wrapped under its thing in a terminal; one line for programs."""
    if not note:
        return
    width = max(console.width - len(_GAP), 20)
    lines = textwrap.wrap(note, width, break_long_words=False, break_on_hyphens=False)
    for line in lines if console.is_terminal else [" ".join(note.split())]:
        console.print(Text(_GAP + line, style="red"), soft_wrap=True)


def _coloured(text: str, inline: str = "{}") -> Text:
    return Text(inline.format(text), style=_COLOURS.get(text.strip(), ""))


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def ago(moment: datetime, now: datetime | None = None) -> str:
    """How long something is past, or ahead; the date when it is over a month."""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if -1 < seconds < 2:
        return "just now"
    if abs(seconds) >= 30 * 86400:
        return f"{moment:%Y-%m-%d}"
    text = f"{abs(seconds):.0f} s" if abs(seconds) < 10 else span(abs(seconds))
    return f"{text} ago" if seconds > 0 else f"in {text}"


def span(seconds: float | None) -> str:
    """A duration with its unit; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size(count: int) -> str:
    """A number of bytes, in the unit that fits."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 10 and units[0] != "bytes" else f"{value:.0f} {units[0]}"


def number(value: float | None) -> str:
    """Four digits of a measurement; nothing for None."""
    return "" if value is None else f"{value:.4g}"
