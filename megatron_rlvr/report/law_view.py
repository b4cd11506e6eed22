"""The law R = -a exp(H) + b in pictures: accuracy against entropy, and over the steps with its ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_rlvr.report.charts import Chart, Series, draw, number, round_ticks
from megatron_rlvr.report.evaluations import LawPoint, Row, law_entropy_key, law_points
from megatron_rlvr.report.panels import card, chart_of, figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400.0, 200.0, 46.0, 10.0, 10.0, 36.0
CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LawCurve:
    """Coefficients to draw."""

    a: float
    b: float
    ceiling_se: float
    """Standard error of the ceiling b - a."""

    @property
    def ceiling(self) -> float:
        return self.b - self.a

    def __call__(self, entropy: float) -> float:
        return self.b - self.a * math.exp(entropy)


def law_section(rows: Sequence[Row]) -> str:
    """The law as the run fitted it last; empty before there is a fit."""
    points = law_points(rows)
    last = next((row for row in reversed(rows) if row.get("law/a") is not None), None)
    if last is None or not points:
        return ""
    curve = LawCurve(a=last["law/a"], b=last["law/b"], ceiling_se=last["law/ceiling_se"])
    summary = _summary(last, any(row.get("law/broken") for row in rows))
    charts = [
        law_figure(points, curve, law_entropy_key(rows)),
        accuracy_figure(points, curve),
        _ceiling_figure(rows),
        _error_figure(rows),
    ]
    return (
        "<h2>The law R = −a exp(H) + b</h2>"
        f'<p class="note">{escape(summary)}</p><div class="charts">{"".join(charts)}</div>'
    )


def _summary(row: Row, broken: bool) -> str:
    text = (
        f"After {int(row['law/num_points'])} evaluations: a = {number(row['law/a'])} ± {number(row['law/a_se'])}, "
        f"b = {number(row['law/b'])} ± {number(row['law/b_se'])}, ceiling at entropy 0 = "
        f"{row['law/ceiling']:.1%} ± {row['law/ceiling_se'] * 100:.1f} points (one standard error)."
    )
    if not row["law/valid"]:
        text += (
            " Not to be read as the paper's law: it is for runs in which nothing acts on the entropy, over a wide "
            "enough span of it."
        )
    return text + (" The law broke: see the console's line." if broken else "")


def _ceiling_figure(rows: Sequence[Row]) -> str:
    chart = chart_of(
        rows,
        "Ceiling as fitted so far",
        {"law/ceiling": "ceiling"},
        percent=True,
        points=True,
        note="± one standard error",
        bounds=(-0.5, 1.5),
    )
    if chart is None:
        return ""
    errors = [row.get("law/ceiling_se") for row in rows if row.get("law/ceiling") is not None]
    chart.series[0].errors = [None if error is None else min(error, 1.0) for error in errors]
    return figure(chart)


def _error_figure(rows: Sequence[Row]) -> str:
    chart = chart_of(
        rows,
        "Measured minus predicted accuracy",
        {"law/one_step_error": "one step ahead", "law/early_error": "from the first 15% of steps"},
        percent=True,
        points=True,
        no_headline=True,
    )
    return "" if chart is None else figure(chart)


def accuracy_figure(points: Sequence[LawPoint], curve: LawCurve | None) -> str:
    """Measured accuracy over the steps beside what the law gives at each step's entropy."""
    measured = [point.evaluation for point in points]
    series = [
        Series(
            label="measured",
            values=[e.accuracy for e in measured],
            errors=[e.standard_error for e in measured],
        )
    ]
    if curve is not None:
        series.append(Series(label="law", values=[curve(point.entropy) for point in points], color=2, pale=True))
        if 0 <= curve.ceiling <= 1:
            series.append(Series(label="ceiling", values=[curve.ceiling] * len(points), color=3, pale=True))
    steps = [e.step for e in measured]
    chart = Chart(title="Accuracy over steps", steps=steps, series=series, percent=True, points=True)
    return card("Accuracy over steps", "", [(s.color, s.label) for s in series], "", draw(chart))


def law_figure(points: Sequence[LawPoint], curve: LawCurve | None, entropy_key: str) -> str:
    """Accuracy against entropy, with the fitted curve and its ceiling down to entropy 0."""
    highest = max(point.entropy for point in points) * 1.05 or 1.0
    shown = [point.evaluation.accuracy for point in points]
    if curve is not None:
        # A fit to few points may put its ceiling anywhere; the axis follows it within what an accuracy can be.
        ends = (curve.ceiling - curve.ceiling_se, curve.ceiling + curve.ceiling_se)
        shown += [min(max(end, 0.0), 1.0) for end in ends]
    low, high = min(shown) - 0.02, max(shown) + 0.02

    def x(entropy: float) -> float:
        return LEFT + entropy / highest * (WIDTH - LEFT - RIGHT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (accuracy - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for tick in round_ticks(max(low, 0.0), high):
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick * 100:g}%</text>')
    for tick in round_ticks(0.0, highest):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 20:g}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT:g}" y="{HEIGHT - 5:g}" text-anchor="end">{escape(entropy_key)}, nats</text>')
    if curve is not None:
        grid = [highest * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
        inside = [(x(entropy), y(curve(entropy))) for entropy in grid if low <= curve(entropy) <= high]
        if inside:
            parts.append(f'<path class="line c2" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in inside)}"/>')
        if low <= curve.ceiling <= high:
            top = y(min(curve.ceiling + curve.ceiling_se, high))
            bottom = y(max(curve.ceiling - curve.ceiling_se, low))
            parts.append(f'<path class="line c3" d="M{LEFT + 1:g} {top:.1f}V{bottom:.1f}"/>')
            parts.append(f'<circle class="mark c3" cx="{LEFT + 1:g}" cy="{y(curve.ceiling):.1f}" r="3.5"/>')
    parts += [
        f'<circle class="mark c1" cx="{x(p.entropy):.1f}" cy="{y(p.evaluation.accuracy):.1f}" r="3.5"/>' for p in points
    ]
    opening = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="Accuracy against entropy">'
    keys = [(1, "measured")] + ([(2, "law"), (3, "ceiling ± se")] if curve is not None else [])
    return card("Accuracy against entropy", "", keys, "", f"{opening}{''.join(parts)}</svg>")
