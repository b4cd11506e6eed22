"""What the finished cells of a comparison measured: every quantity with its spread over seeds.

Letters: N seeds of a method.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rlvr.comparison.cells import CellRecord, finished
from megatron_rlvr.comparison.matrix import MIN_SEEDS, Matrix, Method
from megatron_rlvr.entropy.law import LawFit, active_interventions, fit_law
from megatron_rlvr.report.evaluations import evaluations, law_points
from megatron_rlvr.report.metrics_writer import read_metrics
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG

ENDS = 5
"""Steps at the end of a run whose mean is its last value of a quantity measured every step."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom."""
CURVES = {
    "reward/mean": "reward",
    "entropy/mean": "entropy",
    "advantage/zero_fraction": "zero-advantage share",
    "cov/mean": "covariance",
    "response/length_mean": "response length",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A quantity over the seeds of a method."""

    values: tuple[float, ...]
    """One a seed, in the order of the seeds."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def half_width(self) -> float | None:
        """Of the 95% t interval of the mean; None of a single seed."""
        if self.sd is None:
            return None
        degrees = len(self.values) - 1
        quantile = T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.5 / degrees
        return quantile * self.sd / math.sqrt(len(self.values))


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """One finished run."""

    seed: int
    record: CellRecord
    curves: dict[str, dict[int, float]]
    """By metric: values by step; ``eval/accuracy`` holds the held-out accuracy, step 0 before training."""
    scalars: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """The entropy-performance law over the evaluations of all seeds of a method together."""

    fit: LawFit | None
    verdict: str
    """Why there is none, or what it may not be taken for; ``holds`` otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodResult:
    """All finished runs of a method."""

    method: Method
    cells: tuple[CellResult, ...]
    scalars: dict[str, Spread]
    differences: dict[str, Spread]
    """Against the baseline, seed by seed, over the seeds that both have; empty for the baseline itself."""
    law: Law


SCALARS: dict[str, str] = {
    "accuracy_start": "held-out accuracy before training",
    "accuracy_end": "held-out accuracy after training",
    "accuracy_gain": "gain",
    "reward_end": f"training reward, mean of the last {ENDS} steps",
    "entropy_start": "entropy of the first step, nats",
    "entropy_end": f"entropy, mean of the last {ENDS} steps, nats",
    "zero_share": "share of responses with zero advantage, mean over steps",
    "cov": "mean covariance of log-prob and advantage over steps",
    "length_end": f"response length, mean of the last {ENDS} steps, tokens",
    "step_s": "seconds a step (median)",
    "train_s": "seconds of the update a step (median)",
    "wall_s": "seconds of the whole run",
}


def read_results(matrix: Matrix, out: Path) -> list[MethodResult]:
    """Results of every method with at least one finished cell, in the matrix's order.

    Raises:
        ValueError: a record or a metrics file is broken.
    """
    by_method: dict[str, list[CellResult]] = {method.name: [] for method in matrix.methods}
    for cell in matrix.cells():
        record = finished(out, cell)
        if record is not None:
            by_method[cell.method.name].append(read_cell(out, record))
    baseline = {cell.seed: cell.scalars for cell in by_method[matrix.baseline]}
    results = []
    for method in matrix.methods:
        cells = by_method[method.name]
        if not cells:
            continue
        shared = [cell for cell in cells if cell.seed in baseline] if method.name != matrix.baseline else []
        results.append(
            MethodResult(
                method=method,
                cells=tuple(cells),
                scalars={key: Spread(values=tuple(cell.scalars[key] for cell in cells)) for key in _common(cells)},
                differences={
                    key: Spread(values=tuple(cell.scalars[key] - baseline[cell.seed][key] for cell in shared))
                    for key in _common(shared)
                    if all(key in baseline[cell.seed] for cell in shared)
                },
                law=_law(cells, out),
            )
        )
    return results


def _common(cells: Sequence[CellResult]) -> list[str]:
    """Scalars that all cells have."""
    return [key for key in SCALARS if cells and all(key in cell.scalars for cell in cells)]


def read_cell(out: Path, record: CellRecord) -> CellResult:
    """Curves and scalars of one run."""
    rows = read_metrics(out / record.run_dir)
    curves = {key: values for key in CURVES if (values := _curve(rows, key))}
    accuracy = {measured.step: measured.accuracy for measured in evaluations(rows)}
    scalars = {"wall_s": record.wall_s}
    if accuracy:
        curves["eval/accuracy"] = dict(sorted(accuracy.items()))
        scalars["accuracy_end"] = accuracy[max(accuracy)]
        if 0 in accuracy:
            scalars["accuracy_start"] = accuracy[0]
            scalars["accuracy_gain"] = scalars["accuracy_end"] - accuracy[0]
    for key, metric in (("reward_end", "reward/mean"), ("entropy_end", "entropy/mean"),
                        ("length_end", "response/length_mean")):  # fmt: skip
        if metric in curves:
            scalars[key] = statistics.fmean(list(curves[metric].values())[-ENDS:])
    if "entropy/mean" in curves:
        scalars["entropy_start"] = next(iter(curves["entropy/mean"].values()))
    for key, metric in (("zero_share", "advantage/zero_fraction"), ("cov", "cov/mean")):
        if metric in curves:
            scalars[key] = statistics.fmean(curves[metric].values())
    for key, metric in (("step_s", "time/step_s"), ("train_s", "time/train_s")):
        if seconds := _curve(rows, metric):
            scalars[key] = statistics.median(seconds.values())
    return CellResult(seed=record.seed, record=record, curves=curves, scalars=scalars)


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {row["step"]: float(row[key]) for row in rows if key in row and row[key] is not None}


def _law(cells: Sequence[CellResult], out: Path) -> Law:
    """One fit over all seeds: a single short run has too few evaluations."""
    points = [point for cell in cells for point in law_points(read_metrics(out / cell.record.run_dir))]
    H, R = [point.entropy for point in points], [point.evaluation.accuracy for point in points]
    weights = [float(point.evaluation.num_problems or 1) for point in points]
    config = OmegaConf.load(out / cells[0].record.run_dir / RESOLVED_CONFIG)
    interventions = active_interventions(
        estimator=config.advantage.estimator,
        policy_loss=config.loss.name,
        entropy_coef=config.loss.entropy_coef,
        kl_coef=config.loss.kl_coef,
        # Runs of before there were controllers have none.
        controlled=OmegaConf.select(config, "controller.target_entropy") is not None,
    )
    try:
        fit = fit_law(H, R, weights=weights, interventions=interventions)
    except ValueError as error:
        return Law(fit=None, verdict=f"no fit: {error}")
    return Law(fit=fit, verdict=fit.reason or "holds")


def clear_difference(spread: Spread) -> bool:
    """Whether the 95% t interval of a mean difference over enough seeds leaves out zero."""
    enough = len(spread.values) >= MIN_SEEDS
    return enough and spread.half_width is not None and abs(spread.mean) > spread.half_width
