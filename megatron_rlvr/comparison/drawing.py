"""Two kinds of figure, as inline SVG in the report's style: dots of every seed, and small curves of every seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from megatron_rlvr.comparison.results import Spread
from megatron_rlvr.report.charts import number

DOT_WIDTH, DOT_LEFT, DOT_RIGHT, DOT_ROW, DOT_FOOT = 400.0, 128.0, 14.0, 20.0, 22.0
PANEL_WIDTH, PANEL_HEIGHT, PANEL_LEFT, PANEL_RIGHT, PANEL_TOP, PANEL_FOOT = 220.0, 130.0, 38.0, 6.0, 6.0, 18.0

Curve = Mapping[int, float]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: the values with a margin."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 0.5
    return low - margin, high + margin


def tick_text(value: float, *, percent: bool) -> str:
    return f"{value * 100:g}%" if percent else number(value)


def dots(rows: Sequence[tuple[str, Spread]], *, title: str, baseline: str, percent: bool) -> str:
    """A row a method: a dot for every seed, a bar at their mean; a line down from the baseline's mean.

    Args:
        rows: label and values over seeds.
        title: for screen readers.
        baseline: its label.
        percent: values are shares.
    """
    low, high = value_range([value for _, spread in rows for value in spread.values])
    height = len(rows) * DOT_ROW + DOT_FOOT + 6

    def x(value: float) -> float:
        return DOT_LEFT + (value - low) / (high - low) * (DOT_WIDTH - DOT_LEFT - DOT_RIGHT)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - DOT_FOOT:g}"/>')
        text = tick_text(tick, percent=percent)
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 7:g}" text-anchor="middle">{text}</text>')
    for label, spread in rows:
        if label == baseline:
            at = x(spread.mean)
            parts.append(f'<line class="base" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - DOT_FOOT:g}"/>')
    for index, (label, spread) in enumerate(rows):
        y = 4 + (index + 0.5) * DOT_ROW
        parts.append(f'<text x="{DOT_LEFT - 8:g}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>')
        at = x(spread.mean)
        parts.append(f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 7:.1f}" y2="{y + 7:.1f}"/>')
        parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{y:.1f}" r="3.5"/>' for value in spread.values]
    return _svg(DOT_WIDTH, height, title, parts)


def curve_panel(
    curves: Sequence[Curve],
    reference: Curve | None,
    *,
    title: str,
    bounds: tuple[float, float],
    steps: tuple[int, int],
    percent: bool,
) -> str:
    """Every seed as a thin line, their mean bold, the baseline's mean grey behind them.

    Args:
        curves: values by step, one a seed.
        reference: the baseline's mean; None in its own panel.
        title: for screen readers.
        bounds: of the value axis, the same in all panels of a quantity.
        steps: first and last step of the axis.
        percent: values are shares.
    """
    low, high = bounds
    first, last = steps

    def x(step: int) -> float:
        return PANEL_LEFT + (step - first) / max(last - first, 1) * (PANEL_WIDTH - PANEL_LEFT - PANEL_RIGHT)

    def y(value: float) -> float:
        return PANEL_HEIGHT - PANEL_FOOT - (value - low) / (high - low) * (PANEL_HEIGHT - PANEL_FOOT - PANEL_TOP)

    def path(curve: Curve, kind: str) -> str:
        points = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in sorted(curve.items()))
        return f'<path class="{kind}" d="M{points}"/>' if points else ""

    parts = []
    for tick in ticks(low, high, 3):
        parts.append(
            f'<line class="grid" x1="{PANEL_LEFT:g}" x2="{PANEL_WIDTH - PANEL_RIGHT:g}" '
            f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        text = tick_text(tick, percent=percent)
        parts.append(f'<text x="{PANEL_LEFT - 5:g}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{PANEL_HEIGHT - 4:g}" text-anchor="{anchor}">{step}</text>')
    if reference is not None:
        parts.append(path(reference, "reference"))
    parts += [path(curve, "one") for curve in curves]
    parts.append(path(mean_curve(curves), "mean"))
    return _svg(PANEL_WIDTH, PANEL_HEIGHT, title, parts)


def mean_curve(curves: Sequence[Curve]) -> dict[int, float]:
    """Mean over seeds at the steps that all of them have."""
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in sorted(shared)}


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
