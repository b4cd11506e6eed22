"""The section of named evaluation sets: pass@k and greedy accuracy over the steps, with their intervals."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rlvr.report.charts import Chart, Series
from megatron_rlvr.report.evaluations import Row
from megatron_rlvr.report.panels import NUM_COLORS, figures

MEASURED = re.compile(r"eval/([^/]+)/(start_)?(pass@\d+|greedy)")


def eval_sets_section(rows: Sequence[Row]) -> str:
    """A chart a set; empty where none was evaluated."""
    charts = eval_set_charts(rows)
    return f"<h2>Evaluation sets</h2>{figures(charts)}" if charts else ""


def eval_set_charts(rows: Sequence[Row]) -> list[Chart]:
    """By set, in order of their names: every estimate over the steps at which it was made, step 0 before training."""
    found: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}
    for row in rows:
        for key, value in row.items():
            match = MEASURED.fullmatch(key)
            if match is None or value is None:
                continue
            name, before, estimate = match.groups()
            step = row["step"] - 1 if before else row["step"]
            low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
            half = None if low is None or high is None else (high - low) / 2
            found.setdefault(name, {}).setdefault(estimate, {})[step] = (float(value), half)
    return [_chart(name, found[name]) for name in sorted(found)]


def _chart(name: str, estimates: dict[str, dict[int, tuple[float, float | None]]]) -> Chart:
    steps = sorted({step for points in estimates.values() for step in points})
    series = [
        Series(
            label=label,
            values=[points[step][0] if step in points else None for step in steps],
            errors=[points[step][1] if step in points else None for step in steps],
            color=1 + place % NUM_COLORS,
        )
        for place, (label, points) in enumerate(sorted(estimates.items(), key=lambda item: _order(item[0])))
    ]
    return Chart(
        title=name,
        steps=steps,
        series=series,
        percent=True,
        points=True,
        bounds=(0.0, 1.0),
        from_zero=True,
        note="bars: half the interval over problems",
    )


def _order(estimate: str) -> tuple[int, int]:
    """pass@1, pass@2, ..., greedy."""
    kind, _, k = estimate.partition("@")
    return (0, int(k)) if kind == "pass" else (1, 0)
