"""A curve by step, in characters, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

_TICKS = 6


def curve(
    points: Sequence[tuple[int, float]], title: str, width: int, limits: tuple[float, float] | None = None
) -> str | None:
    """Values by whole steps, `width` columns wide; None when `plotext` is not installed or there is nothing to draw.

    `limits` are those of the values; as far as they go when not given.
    """
    if len(points) < 2:
        return None
    try:
        import plotext
    except ImportError:
        return None  # an extra of the client; what calls this shows the same numbers otherwise
    steps = [step for step, _ in points]
    count = min(_TICKS, len(points) - 1)
    ticks = sorted({steps[index * (len(points) - 1) // count] for index in range(count + 1)})
    figure = plotext.figure
    figure.clear.all()
    figure.theme("colorless")
    figure.plot_size(width, 14)
    figure.draw(figure.signal(*zip(*points, strict=True), marker="braille").lines())
    figure.title(title)
    figure.label("step", "x")
    figure.ruler("x").ticks(ticks, [str(tick) for tick in ticks])
    if limits is not None:
        figure.ruler("y").lim(*limits)
    return str(figure.build().string(colorless=True)).rstrip()
