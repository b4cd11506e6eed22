import html
import json
import re
import xml.etree.ElementTree as ET

import pytest

from megatron_rlvr.report.charts import MAX_POINTS, Chart, Series, draw, moving_average, number


def parsed(chart: Chart) -> ET.Element:
    return ET.fromstring(draw(chart))


def points_of(path: str) -> list[list[tuple[float, float]]]:
    """Coordinates by stroke, a new one at every M."""
    strokes = [stroke for stroke in path.rstrip("Z").split("M") if stroke]
    return [[tuple(map(float, pair.split())) for pair in stroke.split("L")] for stroke in strokes]  # type: ignore[misc]


def lines(svg: ET.Element, kind: str = "line") -> list[ET.Element]:
    return [e for e in svg.iter("path") if e.get("class", "").startswith(kind)]


def test_values_lie_where_the_axis_says() -> None:
    chart = Chart(title="r", steps=[0, 5, 10], series=[Series(label="mean", values=[0.0, 1.0, 0.5])], from_zero=True)
    svg = parsed(chart)
    (stroke,) = points_of(lines(svg)[0].get("d", ""))
    ticks = {t.text: float(t.get("y", "")) - 3.5 for t in svg.iter("text") if t.get("text-anchor") == "end"}
    assert stroke[0][1] == pytest.approx(ticks["0"], abs=0.1)
    assert stroke[1][1] == pytest.approx(ticks["1"], abs=0.1)
    assert stroke[1][0] == pytest.approx((stroke[0][0] + stroke[2][0]) / 2, abs=0.1)


def test_a_missing_value_breaks_the_line() -> None:
    svg = parsed(Chart(title="r", steps=[1, 2, 3, 4, 5], series=[Series(label="m", values=[1, 2, None, 3, 4])]))
    assert [len(stroke) for stroke in points_of(lines(svg)[0].get("d", ""))] == [2, 2]


def test_log_axis_places_decades_evenly_and_skips_what_has_no_logarithm() -> None:
    values = [1e-6, 1e-5, 1e-4, 0.0, 1e-4]
    svg = parsed(Chart(title="d", steps=[1, 2, 3, 4, 5], series=[Series(label="m", values=values)], log=True))
    first, _ = points_of(lines(svg)[0].get("d", ""))
    heights = [y for _, y in first]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert {"10⁻⁶", "10⁻⁴"} <= {t.text for t in svg.iter("text")}


def test_stacked_areas_stand_on_each_other() -> None:
    series = [Series(label="a", values=[1.0, 1.0]), Series(label="b", values=[2.0, 3.0], color=2)]
    svg = parsed(Chart(title="t", steps=[1, 2], series=series, stacked=True))
    low, high = (points_of(e.get("d", ""))[0] for e in lines(svg, "area"))
    assert low[:2] == high[2:][::-1]
    zero, top = low[2][1], high[1][1]
    assert (zero - low[0][1]) * 4 == pytest.approx(zero - top, abs=0.5)


def test_hover_has_every_value_as_text() -> None:
    chart = Chart(
        title='a "quoted" <title>', steps=[1, 2], series=[Series(label="m", values=[0.123456, None])], unit="s"
    )
    svg = parsed(chart)
    hover = json.loads(svg.get("data-chart", ""))
    assert hover["steps"] == [1, 2]
    assert hover["series"] == [{"label": "m", "color": 1, "text": ["0.123 s", "–"]}]
    assert svg.get("aria-label") == 'a "quoted" <title>: m 0.123 s'


def test_a_long_run_is_thinned_but_keeps_its_end() -> None:
    steps = list(range(1, 5001))
    text = draw(Chart(title="r", steps=steps, series=[Series(label="m", values=[float(s) for s in steps])]))
    match = re.search(r'data-chart="([^"]*)"', text)
    assert match is not None
    kept = json.loads(html.unescape(match.group(1)))["steps"]
    assert len(kept) <= MAX_POINTS + 1
    assert (kept[0], kept[-1]) == (1, 5000)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [None, 1.0], [1e-12, 2e-12], [-5.0, 1e9]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_odd_values_still_draw_inside_the_frame(values: list[float | None], from_zero: bool) -> None:
    chart = Chart(
        title="r", steps=list(range(len(values))), series=[Series(label="m", values=values)], from_zero=from_zero
    )
    for element in lines(parsed(chart)):
        for stroke in points_of(element.get("d", "")):
            assert all(0 <= x <= 400 and 0 <= y <= 200 for x, y in stroke)


def test_moving_average_is_shorter_at_the_ends_and_keeps_holes() -> None:
    assert moving_average([1.0, 2.0, 6.0, None, 4.0], 3) == [1.5, 3.0, 4.0, None, 4.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (123.4, "123"), (12345.0, "12.3k"), (2.5e6, "2.5M"), (-1.2e-6, "−1.2e−06")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text
