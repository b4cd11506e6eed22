"""Line and area charts as inline SVG, drawn once here and given hover values by ``page.js``.

Coordinates are those of a 400 x 200 view box, which is about the width of a card on a phone and in a three-column
page alike, so that text keeps its size. Colours come from the page's CSS through class names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 400.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0
MAX_POINTS = 600
"""More steps than this are thinned for drawing (the file of metrics keeps all)."""
MARKS_UP_TO = 60
"""Marks and error bars are left out where there are more; they would cover the line."""
SMOOTH_FROM = 30
"""From this many points on a moving average is drawn over the pale values."""

Values = Sequence[float | None]


@dataclass(kw_only=True, slots=True)
class Series:
    """One quantity over the steps."""

    label: str
    values: Values
    """One per step of the chart, None where there is none."""
    color: int = 1
    """1 to 8, a colour of the page's palette."""
    pale: bool = False
    """Drawn thin, as background to the main quantity."""
    errors: Values | None = None
    """Half lengths of error bars."""
    marks: bool = False
    """Drawn as marks alone, for values that no line should join."""


@dataclass(kw_only=True, slots=True)
class Chart:
    """One panel of the report.

    Example:
        >>> svg = draw(Chart(title="Reward", steps=[1, 2], series=[Series(label="mean", values=[0.1, 0.4])]))
    """

    title: str
    steps: Sequence[int]
    series: list[Series]
    unit: str = ""
    note: str = ""
    """What the quantity is, in a line."""
    percent: bool = False
    """Values are shares, shown in per cent."""
    log: bool = False
    stacked: bool = False
    from_zero: bool = False
    points: bool = False
    """Marks at the values, for a quantity that is measured now and then."""
    bounds: tuple[float, float] | None = None
    """The axis never reaches beyond these."""
    no_headline: bool = False
    """No latest value beside the title, as for several lines of equal rank."""

    def format(self, value: float | None) -> str:
        """A value as text, with its unit."""
        if value is None:
            return "–"
        if self.percent:
            return f"{value * 100:.1f}%"
        return number(value) + (f" {self.unit}" if self.unit else "")


def number(value: float) -> str:
    """Three significant digits, thousands as k and M.

    Example:
        >>> number(12345.0), number(-0.01234), number(0.0000012)
        ('12.3k', '−0.0123', '1.2e−06')
    """
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.3g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.3g}k"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 1e-3 or value == 0:
        text = f"{value:.3g}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def moving_average(values: Values, window: int) -> list[float | None]:
    """Mean over a centred window, shorter at the ends; None where the value is None."""
    half = window // 2
    averaged: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        averaged.append(None if value is None else sum(near) / len(near))
    return averaged


def thin(chart: Chart) -> Chart:
    """The chart with at most about `MAX_POINTS` steps: every n-th, and the last."""
    stride = math.ceil(len(chart.steps) / MAX_POINTS)
    if stride <= 1:
        return chart
    kept = [i for i in range(len(chart.steps)) if i % stride == 0 or i == len(chart.steps) - 1]

    def pick(values: Values) -> list[float | None]:
        return [values[i] for i in kept]

    series = [
        replace(s, values=pick(s.values), errors=None if s.errors is None else pick(s.errors)) for s in chart.series
    ]
    return replace(chart, steps=[chart.steps[i] for i in kept], series=series)


class _Axis:
    """Maps values to positions and knows its ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _value_range(chart: Chart) -> tuple[float, float]:
    if chart.stacked:
        tops = [sum(v or 0.0 for v in column) for column in zip(*(s.values for s in chart.series), strict=True)]
        return 0.0, (max(tops, default=1.0) or 1.0) * 1.05
    seen: list[float] = []
    for series in chart.series:
        errors = series.errors or [0.0] * len(series.values)
        for value, error in zip(series.values, errors, strict=True):
            if value is not None and not (chart.log and value <= 0):
                seen += [value] if chart.log else [value - (error or 0.0), value + (error or 0.0)]
    if not seen:
        return (1e-6, 1.0) if chart.log else (0.0, 1.0)
    low, high = min(seen), max(seen)
    if chart.log:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.0001))
    if chart.from_zero:
        low = min(low, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    lower = low if chart.from_zero and low == 0.0 else low - margin
    upper = high + margin
    if chart.bounds is not None:
        lower, upper = max(lower, chart.bounds[0]), min(upper, chart.bounds[1])
    return (lower, upper) if lower < upper else (lower - 0.5, upper + 0.5)


def _value_ticks(chart: Chart, low: float, high: float) -> list[float]:
    if not chart.log:
        return round_ticks(low, high)
    first, last = round(math.log10(low)), round(math.log10(high))
    stride = math.ceil((last - first) / 5)
    return [10.0**p for p in range(first, last + 1, max(stride, 1))]


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Path data through the points, broken where one is None."""
    data, pen_down = [], False
    for point in points:
        if point is not None:
            data.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        pen_down = point is not None
    return "".join(data)


def draw(chart: Chart) -> str:
    """The chart as an ``<svg>`` element, its values in ``data-chart`` for the hover."""
    chart = thin(chart)
    low, high = _value_range(chart)
    steps = list(chart.steps)
    x = _Axis(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1, LEFT, WIDTH - RIGHT)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP, log=chart.log)
    body = _grid(chart, x, y, low, high) + (_areas(chart, x, y) if chart.stacked else _lines(chart, x, y))
    label = f"{chart.title}: " + ", ".join(
        f"{s.label} {chart.format(next((v for v in reversed(s.values) if v is not None), None))}" for s in chart.series
    )
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{escape(json.dumps(_hover_data(chart, x), separators=(",", ":")))}">{body}'
        f'<line class="cursor" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}" visibility="hidden"/></svg>'
    )


def _grid(chart: Chart, x: _Axis, y: _Axis, low: float, high: float) -> str:
    parts = []
    for tick in _value_ticks(chart, low, high):
        text = f"{tick * 100:g}%" if chart.percent else (_power_of_ten(tick) if chart.log else number(tick))
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in round_ticks(chart.steps[0], max(chart.steps[-1], chart.steps[0] + 1), 5):
        if tick == int(tick):
            anchor = "end" if x(tick) > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 8:g}" text-anchor="{anchor}">{int(tick)}</text>')
    return "".join(parts)


def _power_of_ten(value: float) -> str:
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _lines(chart: Chart, x: _Axis, y: _Axis) -> str:
    parts = []
    # Main quantities last, so that they lie on top.
    for series in sorted(chart.series, key=lambda s: not s.pale):
        visible = [None if v is None or (chart.log and v <= 0) else v for v in series.values]
        drawn = sum(v is not None for v in visible)
        if series.marks:
            parts.append(_marks(chart, series, x, y))
            continue
        smooth = drawn >= SMOOTH_FROM and not series.pale and not chart.points
        if smooth:
            parts.append(_line(chart, series, visible, x, y, pale=True))
            parts.append(_line(chart, series, moving_average(visible, drawn // 15), x, y, pale=False))
        else:
            parts.append(_line(chart, series, visible, x, y, pale=series.pale))
        if (chart.points and drawn < MARKS_UP_TO) or drawn == 1:
            parts.append(_marks(chart, series, x, y))
    return "".join(parts)


def _line(chart: Chart, series: Series, values: Values, x: _Axis, y: _Axis, *, pale: bool) -> str:
    points = [None if v is None else (x(step), y(v)) for step, v in zip(chart.steps, values, strict=True)]
    return f'<path class="line c{series.color}{" pale" if pale else ""}" d="{_path(points)}"/>'


def _marks(chart: Chart, series: Series, x: _Axis, y: _Axis) -> str:
    parts = []
    errors = series.errors or [None] * len(series.values)
    for step, value, error in zip(chart.steps, series.values, errors, strict=True):
        if value is None or (chart.log and value <= 0):
            continue
        if error:
            low, high, left = y(value - error), y(value + error), x(step) - 3
            stroke = f"M{x(step):.1f} {low:.1f}V{high:.1f}M{left:.1f} {low:.1f}h6M{left:.1f} {high:.1f}h6"
            parts.append(f'<path class="line thin c{series.color}" d="{stroke}"/>')
        parts.append(f'<circle class="mark c{series.color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"/>')
    return "".join(parts)


def _areas(chart: Chart, x: _Axis, y: _Axis) -> str:
    parts = []
    base = [0.0] * len(chart.steps)
    for series in chart.series:
        top = [b + (v or 0.0) for b, v in zip(base, series.values, strict=True)]
        forward = [(x(step), y(v)) for step, v in zip(chart.steps, top, strict=True)]
        backward = [(x(step), y(v)) for step, v in zip(chart.steps, base, strict=True)][::-1]
        parts.append(f'<path class="area c{series.color}" d="{_path([*forward, *backward])}Z"/>')
        base = top
    return "".join(parts)


def _hover_data(chart: Chart, x: _Axis) -> dict[str, object]:
    """What the page needs to show values under the pointer: positions and texts, nothing to be computed."""
    return {
        "steps": list(chart.steps),
        "x": [round(x(step), 1) for step in chart.steps],
        "series": [
            {"label": s.label, "color": s.color, "text": [chart.format(v) for v in s.values]} for s in chart.series
        ],
    }
