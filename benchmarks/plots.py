"""Line charts as SVG, drawn by hand: the results are few numbers, and a picture of them is a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Told apart also by those who see few colours (after M. Okabe and K. Ito)."""
_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """From a range of values to a range of pixels."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 2)


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Points],
    wanted: Mapping[str, float] | None = None,
) -> str:
    """The chart as the text of an SVG file; y begins at 0. `wanted` are values of y to mark with a dashed line, in
    the colour of the series that has the same name. Raises ValueError without any point."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points] + list((wanted or {}).values())
    if not xs:
        raise ValueError(f"the chart {title!r} has no points")
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0.0, max(ys))
    across = Axis(min(xs[0], x_ticks[0]), max(*xs, x_ticks[-1]), LEFT, WIDTH - RIGHT)
    up = Axis(0.0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 18, title, anchor="middle"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, anchor="middle"),
        f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>',
        *_grid(across, up, x_ticks, y_ticks),
    ]
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        parts += _series(across, up, points, colour)
        parts += _legend(LEFT + 12 + i * min(200, (WIDTH - LEFT - RIGHT) // len(series)), name, colour)
        if wanted and name in wanted:
            y = up.at(wanted[name])
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{colour}" stroke-dasharray="5 4"/>'
            )
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float) -> list[float]:
    """Round values that reach from `low` or below to `high` or above, about six of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _grid(across: Axis, up: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = up.at(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    parts += [
        _text(across.at(value), HEIGHT - BOTTOM + 16, f"{value:g}", anchor="middle") for value in x_ticks
    ]
    return parts


def _series(across: Axis, up: Axis, points: Points, colour: str) -> list[str]:
    places = [(across.at(x), up.at(y)) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in places]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *dots]


def _legend(x: float, name: str, colour: str) -> list[str]:
    return [
        f'<line x1="{x}" x2="{x + 20}" y1="34" y2="34" stroke="{colour}" stroke-width="3"/>',
        _text(x + 26, 38, name, anchor="start"),
    ]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
