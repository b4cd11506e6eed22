"""The law R = -a exp(H) + b over the rows of metrics of a run that goes on (spec C4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rlvr.entropy.law import EARLY_SHARE, MIN_POINTS, LawFit, LawMonitor, LawReport, fit_law
from megatron_rlvr.metrics import LAW_ENTROPY_KEYS


@dataclass(frozen=True, kw_only=True, slots=True)
class LawNews:
    """What one step says."""

    metrics: dict[str, float]
    """``law/...``; empty for a step without evaluation or before there is a fit."""
    notes: list[str]
    """Lines for a person: the law is broken, the early prediction was made, its score at the end."""


class LawTracker:
    """Fits the law at every evaluation, watches its ceiling, and keeps and scores an early prediction.

    A point is the held-out accuracy after a step with the entropy of that step's rollouts (that before the first step
    goes with the first step's entropy, which is of the same policy), as ``tools/law.py`` takes them.

    Args:
        total_steps: Rollout steps of the whole run; the early prediction is made from the first 15% of them, or from
            the first three evaluations where those come later.
        interventions: What acts on the entropy in this run (`active_interventions`).
        reference: Law of a run without interventions.
        patience: Evaluations in a row above the ceiling that break the law.

    Example:
        >>> tracker = LawTracker(total_steps=120)
        >>> tracker.observe({"step": 20, "entropy/sequence_mean": 0.7, "eval/accuracy": 0.31, "eval/num_problems": 256})
    """

    def __init__(
        self,
        *,
        total_steps: int,
        interventions: Sequence[str] = (),
        reference: LawFit | None = None,
        patience: int = 3,
    ) -> None:
        self.total_steps = total_steps
        self.monitor = LawMonitor(interventions=interventions, reference=reference, patience=patience)
        self.early: LawFit | None = None
        """Law of the first points, as it was fitted then."""
        self.early_step = 0
        """Step at which it was fitted."""
        self._early_squared_errors: list[float] = []

    def observe(self, row: Mapping[str, Any]) -> LawNews:
        """Takes in a step's metrics."""
        entropy = next((row[key] for key in LAW_ENTROPY_KEYS if row.get(key) is not None), None)
        if entropy is None or not math.isfinite(entropy):
            return LawNews(metrics={}, notes=[])
        step, metrics, notes = int(row["step"]), {}, []
        for key, at in (("eval/start_accuracy", step - 1), ("eval/accuracy", step)):
            if row.get(key) is None:
                continue
            accuracy, num_eval = float(row[key]), int(row.get("eval/num_problems") or 1)
            metrics = self._early_metrics(entropy, accuracy)
            report = self.monitor.add(at, float(entropy), accuracy, num_eval)
            metrics |= _law_metrics(report)
            notes += self._notes(report, at, accuracy)
        return LawNews(metrics=metrics, notes=notes)

    def _early_metrics(self, entropy: float, accuracy: float) -> dict[str, float]:
        """How the early prediction does on a later point."""
        if self.early is None:
            return {}
        predicted = float(self.early.predict(entropy))
        self._early_squared_errors.append((accuracy - predicted) ** 2)
        return {
            "law/early_predicted": predicted,
            "law/early_error": accuracy - predicted,
            "law/early_rmse": math.sqrt(sum(self._early_squared_errors) / len(self._early_squared_errors)),
        }

    def _notes(self, report: LawReport, step: int, accuracy: float) -> list[str]:
        notes = []
        if report.broken:
            held = report.held_against
            assert held is not None, "without a ceiling nothing is above it"
            notes.append(
                f"law broken: held-out accuracy {accuracy:.1%} at step {step}, in {self.monitor.patience} evaluations "
                f"in a row above the ceiling of {held.ceiling:.1%} by more than 3 standard errors "
                f"({held.ceiling_se * 100:.1f} points each)"
            )
        if self.early is None and step >= EARLY_SHARE * self.total_steps and report.fit is not None:
            self.early, self.early_step = report.fit, step
            if step < self.total_steps:
                notes.append(
                    f"law from {report.fit.num_points} evaluations up to step {step}: "
                    f"ceiling {report.fit.ceiling:.1%} ± {report.fit.ceiling_se * 100:.1f} points at entropy 0"
                    + (f" (not valid: {report.fit.reason})" if report.fit.reason else "")
                )
        elif self.early is not None and step == self.total_steps:
            count = len(self._early_squared_errors)
            rmse = math.sqrt(sum(self._early_squared_errors) / count)
            notes.append(
                f"law of step {self.early_step} against {count} later evaluations: "
                f"off by {rmse * 100:.1f} points (root mean square)"
            )
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as a checkpoint or JSON keeps them."""
        return {
            "monitor": self.monitor.state_dict(),
            "early": None if self.early is None else asdict(self.early),
            "early_step": self.early_step,
            "early_squared_errors": list(self._early_squared_errors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; number of steps, interventions and patience stay this run's own."""
        self.monitor.load_state_dict(state["monitor"])
        self.early = None if state["early"] is None else LawFit(**state["early"])
        self.early_step = int(state["early_step"])
        self._early_squared_errors = [float(error) for error in state["early_squared_errors"]]


def _law_metrics(report: LawReport) -> dict[str, float]:
    fit = report.fit
    if fit is None:
        return {}
    metrics = {
        "law/a": fit.a,
        "law/a_se": fit.a_se,
        "law/b": fit.b,
        "law/b_se": fit.b_se,
        "law/ceiling": fit.ceiling,
        "law/ceiling_se": fit.ceiling_se,
        "law/r2": fit.r2,
        "law/p_value": fit.p_value,
        "law/span": fit.span,
        "law/num_points": float(fit.num_points),
        "law/valid": float(fit.valid),
        "law/above_ceiling": float(report.above_ceiling),
        "law/broken": float(report.broken),
    }
    if report.one_step_error is not None and report.one_step_rmse is not None:
        metrics |= {"law/one_step_error": report.one_step_error, "law/one_step_rmse": report.one_step_rmse}
    return metrics


def law_of_points(points: Sequence[tuple[float, float, int]], *, interventions: Sequence[str] = ()) -> LawFit:
    """The law of a finished run, as a reference.

    Args:
        points: (entropy in nats, accuracy as a fraction, evaluated problems).

    Raises:
        ValueError: as `fit_law`.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"the law needs {MIN_POINTS} evaluations or more, got {len(points)}")
    entropy, accuracy, num_eval = zip(*points, strict=True)
    return fit_law(entropy, accuracy, weights=num_eval, interventions=interventions)
