"""Fits the entropy-performance law R = -a exp(H) + b to finished runs, prints a table and draws it.

    python tools/law.py outputs/latest outputs/grpo/2026-01-31_14-07-55 --html law.html

RUN is a run's folder or its metrics.jsonl. Every evaluation of held-out problems gives one point, with the entropy of
its step: `entropy/sequence_mean` as the paper has it, or `entropy/mean` where a run has only that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from omegaconf import OmegaConf

from megatron_rlvr.entropy.law import EARLY_SHARE, LawFit, active_interventions, fit_law, predict_early
from megatron_rlvr.report.charts import number
from megatron_rlvr.report.evaluations import LawPoint, law_entropy_key, law_points
from megatron_rlvr.report.law_view import LawCurve, accuracy_figure, law_figure
from megatron_rlvr.report.metrics_writer import METRICS_FILE, read_metrics
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG

HEADINGS = ("run", "points", "a", "b", "ceiling", "R²", "p", "early error", "span", "law")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The points of one run and what the law makes of them."""

    name: str
    entropy_key: str
    points: list[LawPoint]
    interventions: tuple[str, ...]
    fit: LawFit | None
    verdict: str
    """Why there is no fit or what it may not be taken for; ``holds`` otherwise."""
    early_rmse: float | None

    @property
    def curve(self) -> LawCurve | None:
        """What is drawn of the fit."""
        fit = self.fit
        return None if fit is None else LawCurve(a=fit.a, b=fit.b, ceiling_se=fit.ceiling_se)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--html", type=Path, default=Path("law.html"), help="page to write (default: %(default)s)")
    parser.add_argument(
        "--early", type=float, default=EARLY_SHARE, help="share of steps the early prediction fits (%(default)s)"
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
    points = law_points(rows)
    interventions = read_interventions(run_dir)
    H, R = [point.entropy for point in points], [point.evaluation.accuracy for point in points]
    weights = [float(point.evaluation.num_problems or 1) for point in points]
    fit, early_rmse = None, None
    try:
        fit = fit_law(H, R, weights=weights, interventions=interventions)
        verdict = fit.reason or "holds"
    except ValueError as error:
        verdict = f"no fit: {error}"
    if fit is not None and len(points) > 3:
        try:
            steps = [point.evaluation.step for point in points]
            early_rmse = predict_early(H, R, share=early_share, steps=steps, weights=weights).rmse
        except ValueError as error:
            verdict += f"; no early prediction: {error}"
    return Run(
        name=f"{run_dir.parent.name}/{run_dir.name}",
        entropy_key=law_entropy_key(rows),
        points=points,
        interventions=interventions,
        fit=fit,
        verdict=verdict,
        early_rmse=early_rmse,
    )


def read_interventions(run_dir: Path) -> tuple[str, ...]:
    """What acts on the entropy, by the run's resolved configuration."""
    path = run_dir / RESOLVED_CONFIG
    if not path.exists():
        return (f"unknown ({RESOLVED_CONFIG} is missing)",)
    config = OmegaConf.load(path)
    return active_interventions(
        estimator=config.advantage.estimator,
        policy_loss=config.loss.name,
        entropy_coef=config.loss.entropy_coef,
        kl_coef=config.loss.kl_coef,
        # Runs of before there were controllers have none.
        controlled=OmegaConf.select(config, "controller.target_entropy") is not None,
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
        f"{number(fit.a)} ± {number(fit.a_se)}",
        f"{number(fit.b)} ± {number(fit.b_se)}",
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
    css = assets.joinpath("page.css").read_text(encoding="utf-8")
    script = assets.joinpath("page.js").read_text(encoding="utf-8")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(run)) + "</tr>" for run in runs)
    figures = "".join(
        f'<h2>{escape(run.name)}</h2><section class="charts">'
        f"{law_figure(run.points, run.curve, run.entropy_key)}{accuracy_figure(run.points, run.curve)}</section>"
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


if __name__ == "__main__":
    sys.exit(main())
