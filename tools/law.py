"""Fits the entropy-performance law R = -a exp(H) + b to finished runs, prints a table and draws it.

    python tools/law.py outputs/latest outputs/grpo/2026-01-31_14-07-55 --html law.html

RUN is a run's folder or its metrics.jsonl. Every evaluation of held-out problems gives one point, with the entropy of
its step: `entropy/sequence_mean` as the paper has it, or `entropy/mean` where a run has only that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from megatron_rlvr.entropy.law import EARLY_SHARE, LawFit, active_interventions, fit_law, predict_early
from megatron_rlvr.report.charts import Chart, Series, draw, number
from megatron_rlvr.report.html_report import Evaluation, evaluations
from megatron_rlvr.report.metrics_writer import METRICS_FILE, read_metrics
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG

ENTROPY_KEYS = ("entropy/sequence_mean", "entropy/mean")
HEADINGS = ("run", "points", "a", "b", "ceiling", "R²", "p", "early error", "span", "law")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400.0, 200.0, 46.0, 10.0, 10.0, 36.0
TABLE_CSS = """
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); }
td:last-child { white-space: normal; min-width: 220px; }
th { font-weight: 500; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The points of one run and what the law makes of them."""

    name: str
    entropy_key: str
    points: list[tuple[Evaluation, float]]
    """Evaluation and entropy (nats), in order of step."""
    interventions: tuple[str, ...]
    fit: LawFit | None
    verdict: str
    """Why there is no fit or what it may not be taken for; ``holds`` otherwise."""
    early_rmse: float | None

    @property
    def entropies(self) -> list[float]:
        return [entropy for _, entropy in self.points]

    @property
    def accuracies(self) -> list[float]:
        return [evaluation.accuracy for evaluation, _ in self.points]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--html", type=Path, default=Path("law.html"), help="page to write (default: %(default)s)")
    parser.add_argument(
        "--early", type=float, default=EARLY_SHARE, help="share of points the early prediction fits (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(path, early_share=options.early) for path in options.runs]
        options.html.write_text(page(runs), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text_table([HEADINGS, *(cells(run) for run in runs)]))
    print(f"drawn in {options.html}")
    return 0 if any(run.fit is not None for run in runs) else 1


def read_run(path: Path, *, early_share: float) -> Run:
    """Reads a run's points and fits them.

    Raises:
        FileNotFoundError: there is no metrics.jsonl.
        ValueError: a line of it is broken, or `early_share` is out of range.
    """
    if not 0 < early_share < 1:
        raise ValueError(f"--early must be in (0, 1), got {early_share!r}")
    run_dir = (path.parent if path.name == METRICS_FILE else path).resolve()
    rows = read_metrics(run_dir)
    key = next((k for k in ENTROPY_KEYS if any(row.get(k) is not None for row in rows)), ENTROPY_KEYS[0])
    points = points_of(rows, key)
    interventions = read_interventions(run_dir)
    H, R = [h for _, h in points], [e.accuracy for e, _ in points]
    weights = [float(e.num_problems or 1) for e, _ in points]
    fit, early_rmse = None, None
    try:
        fit = fit_law(H, R, weights=weights, interventions=interventions)
        verdict = fit.reason or "holds"
    except ValueError as error:
        verdict = f"no fit: {error}"
    if fit is not None and len(points) > 3:
        try:
            early_rmse = predict_early(H, R, share=early_share, weights=weights).rmse
        except ValueError as error:
            verdict += f"; no early prediction: {error}"
    return Run(
        name=f"{run_dir.parent.name}/{run_dir.name}",
        entropy_key=key,
        points=points,
        interventions=interventions,
        fit=fit,
        verdict=verdict,
        early_rmse=early_rmse,
    )


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[Evaluation, float]]:
    """Evaluations with the entropy of their step. That before the first step goes with the first step's entropy, which
    is of the same policy."""
    entropy = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    points = {}
    for evaluation in evaluations(rows):
        of_step = entropy.get(evaluation.step, entropy.get(evaluation.step + 1))
        if of_step is not None:
            points[evaluation.step] = (evaluation, float(of_step))
    return [points[step] for step in sorted(points)]


def read_interventions(run_dir: Path) -> tuple[str, ...]:
    """What acts on the entropy, by the run's resolved configuration."""
    path = run_dir / RESOLVED_CONFIG
    if not path.exists():
        return (f"unknown ({RESOLVED_CONFIG} is missing)",)
    config = OmegaConf.load(path)
    return active_interventions(
        estimator=config.advantage.estimator, policy_loss=config.loss.name, entropy_coef=config.loss.entropy_coef
    )


def cells(run: Run) -> tuple[str, ...]:
    """A row of the table, in the order of `HEADINGS`."""
    count = str(len(run.points))
    if run.fit is None:
        return (run.name, count, *["–"] * 7, run.verdict)
    fit = run.fit
    return (
        run.name,
        count,
        number(fit.a),
        number(fit.b),
        f"{fit.ceiling:.1%} ± {fit.ceiling_se * 100:.1f}",
        f"{fit.r2:.3f}",
        number(fit.p_value),
        "–" if run.early_rmse is None else f"{run.early_rmse * 100:.1f} points",
        f"{fit.span:.0%}",
        run.verdict,
    )


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def page(runs: Sequence[Run]) -> str:
    """The table and two charts a run, in one file that needs no network."""
    assets = resources.files("megatron_rlvr.report")
    css = assets.joinpath("page.css").read_text(encoding="utf-8") + TABLE_CSS
    script = assets.joinpath("page.js").read_text(encoding="utf-8")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(run)) + "</tr>" for run in runs)
    figures = "".join(
        f'<h2>{escape(run.name)}</h2><section class="charts">{law_figure(run)}{steps_figure(run)}</section>'
        for run in runs
        if run.points
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Entropy-performance law</title><style>{css}</style></head>\n<body><main>"
        "<header><h1>Entropy-performance law</h1><p>R = −a exp(H) + b, accuracy on held-out problems against "
        "policy entropy in nats. The ceiling b − a is the accuracy at entropy 0, with its standard error in "
        "points.</p></header>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{figures}</main><script>{script}</script></body></html>\n"
    )


def figure(title: str, keys: Sequence[tuple[int, str]], svg: str) -> str:
    """A card of the report's style; `keys` are colour and label."""
    legend = "".join(f'<span class="key c{color}">{escape(label)}</span>' for color, label in keys)
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3></figcaption>'
        f'<p class="legend">{legend}</p>{svg}</figure>'
    )


def steps_figure(run: Run) -> str:
    """Measured accuracy over the steps beside what the law gives at each step's entropy."""
    series = [
        Series(
            label="measured",
            values=run.accuracies,
            color=1,
            errors=[evaluation.standard_error for evaluation, _ in run.points],
        )
    ]
    if run.fit is not None:
        series.append(Series(label="law", values=run.fit.predict(run.entropies).tolist(), color=2, pale=True))
        if 0 <= run.fit.ceiling <= 1:
            series.append(Series(label="ceiling", values=[run.fit.ceiling] * len(run.points), color=3, pale=True))
    steps = [evaluation.step for evaluation, _ in run.points]
    chart = Chart(title="Accuracy over steps", steps=steps, series=series, percent=True, points=True)
    return figure("Accuracy over steps", [(s.color, s.label) for s in series], draw(chart))


def law_figure(run: Run) -> str:
    """Accuracy against entropy, with the fitted curve and its ceiling down to entropy 0."""
    highest = max(run.entropies) * 1.05 or 1.0
    curve: list[tuple[float, float]] = []
    shown = list(run.accuracies)
    if run.fit is not None:
        grid = np.linspace(0.0, highest, 60)
        curve = list(zip(grid.tolist(), run.fit.predict(grid).tolist(), strict=True))
        # A fit to few points may put its ceiling anywhere; the axis follows it within what an accuracy can be.
        ends = (run.fit.ceiling - run.fit.ceiling_se, run.fit.ceiling + run.fit.ceiling_se)
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
    parts.append(
        f'<text x="{WIDTH - RIGHT:g}" y="{HEIGHT - 5:g}" text-anchor="end">{escape(run.entropy_key)}, nats</text>'
    )
    inside = [(x(h), y(r)) for h, r in curve if low <= r <= high]
    if inside:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in inside)
        parts.append(f'<path class="line c2" d="M{path}"/>')
    if run.fit is not None and low <= run.fit.ceiling <= high:
        top = y(min(run.fit.ceiling + run.fit.ceiling_se, high))
        bottom = y(max(run.fit.ceiling - run.fit.ceiling_se, low))
        parts.append(f'<path class="line c3" d="M{LEFT + 1:g} {top:.1f}V{bottom:.1f}"/>')
        parts.append(f'<circle class="mark c3" cx="{LEFT + 1:g}" cy="{y(run.fit.ceiling):.1f}" r="3.5"/>')
    parts += [f'<circle class="mark c1" cx="{x(h):.1f}" cy="{y(e.accuracy):.1f}" r="3.5"/>' for e, h in run.points]
    opening = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="Accuracy against entropy">'
    keys = [(1, "measured")] + ([(2, "law"), (3, "ceiling ± se")] if run.fit is not None else [])
    return figure("Accuracy against entropy", keys, f"{opening}{''.join(parts)}</svg>")


def round_ticks(low: float, high: float) -> list[float]:
    """About four round numbers within [low, high]."""
    raw = (high - low) / 4
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = int(np.ceil(low / step)), int(np.floor(high / step))
    return [round(i * step, 12) for i in range(first, last + 1)]


if __name__ == "__main__":
    sys.exit(main())
