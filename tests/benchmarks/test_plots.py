"""Charts: where points lie, read from the picture's own elements."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks import plots

SVG = "{http://www.w3.org/2000/svg}"


def drawn(wanted: dict[str, float] | None = None, **series: list[tuple[float, float]]) -> ET.Element:
    text = plots.lines("a < b", "x", "y", series, wanted)
    return ET.fromstring(text)  # noqa: S314  # what the line above has written


def places(chart: ET.Element, line: int = 0) -> list[tuple[float, float]]:
    points = chart.findall(f"{SVG}polyline")[line].attrib["points"].split()
    return [(float(point.split(",")[0]), float(point.split(",")[1])) for point in points]


def test_points_lie_where_their_values_say() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(drawn(a=[(0, 0), (1, 1), (3, 2)]))
    assert (x2 - x0) == pytest.approx(3 * (x1 - x0), abs=0.05)
    assert (y0 - y2) == pytest.approx(2 * (y0 - y1), abs=0.05)
    assert x0 < x1 and y1 < y0


def test_all_points_are_inside_and_dotted() -> None:
    chart = drawn(a=[(1, 5), (2, 90), (30, 0.5)], b=[(4, 1), (9, 123)])
    circles = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in chart.findall(f"{SVG}circle")]
    assert circles == places(chart, 0) + places(chart, 1)
    for x, y in circles:
        assert plots.LEFT <= x <= plots.WIDTH - plots.RIGHT
        assert plots.TOP <= y <= plots.HEIGHT - plots.BOTTOM


def test_series_are_named_in_their_colours() -> None:
    chart = drawn(first=[(0, 1)], second=[(0, 2)])
    texts = [text.text for text in chart.iter(f"{SVG}text")]
    assert {"first", "second", "x", "y", "a < b"} <= set(texts)
    strokes = [line.attrib["stroke"] for line in chart.findall(f"{SVG}polyline")]
    assert len(set(strokes)) == 2


def test_a_wanted_value_is_a_dashed_line_at_its_height() -> None:
    chart = drawn({"a": 2.0}, a=[(0, 1), (1, 2)])
    (dashed,) = [line for line in chart.findall(f"{SVG}line") if "stroke-dasharray" in line.attrib]
    assert float(dashed.attrib["y1"]) == float(dashed.attrib["y2"]) == places(chart)[1][1]


def test_a_wanted_value_above_all_points_is_inside() -> None:
    chart = drawn({"a": 7.0}, a=[(0, 1)])
    (dashed,) = [line for line in chart.findall(f"{SVG}line") if "stroke-dasharray" in line.attrib]
    assert float(dashed.attrib["y1"]) >= plots.TOP


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="no points"):
        plots.lines("t", "x", "y", {"a": []})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 6, [0, 1, 2, 3, 4, 5, 6]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 15, [0, 5, 10, 15]),
        (0, 4200, [0, 1000, 2000, 3000, 4000, 5000]),
        (3, 3, [3.0, 3.5]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(low: float, high: float, expected: list[float]) -> None:
    assert plots.ticks(low, high) == expected
