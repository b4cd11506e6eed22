"""The entropy-performance law R = -a exp(H) + b, fitted while a run trains (spec C4; Cui et al. 2505.22617 Eq 6).

R is validation accuracy as a fraction, H the mean over sequences of the token-mean entropy in nats. The law is linear
in X = exp(H), so ordinary least squares is exact; points measured on different numbers of problems are weighted by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_rlvr.entropy.f_distribution import f_survival

MIN_SPAN = 0.2
"""Smallest (max - min) / mean of exp(H) from which a slope is read (spec C4)."""
EARLY_SHARE = 0.15
"""Share of the points the paper's early prediction fits on (36 of about 240 steps)."""
MIN_POINTS = 3
"""Two coefficients and one degree of freedom for the residual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LawFit:
    """Coefficients of R = -a exp(H) + b with what they are worth.

    Example:
        >>> fit = fit_law([1.0, 0.5, 0.1], [0.2, 0.35, 0.42])
        >>> fit.a > 0, fit.ceiling == fit.b - fit.a
        (True, True)
    """

    a: float
    """Conversion rate: dR/dH = -a exp(H), a fraction of accuracy per unit of exp(H)."""
    b: float
    a_se: float
    """Standard error of a, sqrt(s2 / Sxx)."""
    b_se: float
    """Standard error of b, sqrt(s2 (1/n + Xbar^2 / Sxx))."""
    ceiling: float
    """b - a, the accuracy at H = 0, as a fraction."""
    ceiling_se: float
    """Standard error of the ceiling, sqrt(s2 (1/n + (1 - Xbar)^2 / Sxx))."""
    s2: float
    """Residual variance of a point of mean weight, n - 2 degrees of freedom; accuracy squared."""
    r2: float
    """Share of the variance of R explained; 0 where R does not vary."""
    f_statistic: float
    """Against a constant, F(1, n - 2); infinite for an exact fit."""
    p_value: float
    """Probability of as large an F if R were constant."""
    num_points: int
    span: float
    """(max - min) / mean of exp(H)."""
    valid: bool
    """Whether the coefficients mean what the paper means by them."""
    reason: str = ""
    """Why not, when not valid."""

    def predict(self, entropy: ArrayLike) -> np.ndarray:
        """R (fraction) the law gives at these entropies (nats), float64 of the same shape."""
        return self.b - self.a * np.exp(np.asarray(entropy, np.float64))


def fit_law(
    entropy: ArrayLike, accuracy: ArrayLike, *, weights: ArrayLike | None = None, interventions: Sequence[str] = ()
) -> LawFit:
    """Fits the law by (weighted) least squares (spec C4).

    Args:
        entropy: float [n] nats.
        accuracy: float [n] fractions.
        weights: float [n] > 0, proportional to the inverse variance of a point, such as the number of evaluated
            answers; only their ratios matter. Equal when None.
        interventions: Names of what acts on the entropy in this run (`active_interventions`); with any of them the
            fit is computed and marked not valid.

    Raises:
        ValueError: fewer than three points, no two different entropies, unequal lengths, or values out of range.
    """
    H, R, w = _checked(entropy, accuracy, weights)
    n = len(H)
    X = np.exp(H)
    w = w * (n / w.sum())
    mean_x, mean_r = float(w @ X) / n, float(w @ R) / n
    dx, dr = X - mean_x, R - mean_r
    sxx, sxr, srr = float(w @ (dx * dx)), float(w @ (dx * dr)), float(w @ (dr * dr))
    if not sxx > 0:
        raise ValueError(f"entropy must differ between points, got {n} equal to {H[0]!r}")
    a = -sxr / sxx
    b = mean_r + a * mean_x
    residual = float(w @ np.square(R - (b - a * X)))
    s2 = residual / (n - 2)
    explained = max(srr - residual, 0.0)
    f_statistic = math.inf if s2 == 0.0 and explained > 0 else (explained / s2 if s2 else 0.0)
    span = float(X.max() - X.min()) / float(X.mean())
    reasons = []
    if span < MIN_SPAN:
        reasons.append(f"exp(H) spans {span:.1%} of its mean, below {MIN_SPAN:.0%}")
    if interventions:
        reasons.append("the law is for runs without interventions, active: " + ", ".join(interventions))
    return LawFit(
        a=a,
        b=b,
        a_se=math.sqrt(s2 / sxx),
        b_se=math.sqrt(s2 * (1 / n + mean_x**2 / sxx)),
        ceiling=b - a,
        ceiling_se=math.sqrt(s2 * (1 / n + (1 - mean_x) ** 2 / sxx)),
        s2=s2,
        r2=1.0 - residual / srr if srr > 0 else 0.0,
        f_statistic=f_statistic,
        p_value=f_survival(f_statistic, 1, n - 2),
        num_points=n,
        span=span,
        valid=not reasons,
        reason="; ".join(reasons),
    )


def _checked(
    entropy: ArrayLike, accuracy: ArrayLike, weights: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    H, R = np.asarray(entropy, np.float64), np.asarray(accuracy, np.float64)
    w = np.ones(H.shape) if weights is None else np.asarray(weights, np.float64)
    for name, values in (("accuracy", R), ("weights", w)):
        if values.shape != H.shape or H.ndim != 1:
            raise ValueError(f"{name} must have one value a point, got {list(values.shape)} for {list(H.shape)}")
    if len(H) < MIN_POINTS:
        raise ValueError(f"the law needs {MIN_POINTS} points or more, got {len(H)}")
    if not (np.isfinite(H) & (H >= 0)).all():
        raise ValueError(f"entropy must be finite and 0 or above, got {H[~(np.isfinite(H) & (H >= 0))][0]}")
    if not ((R >= 0) & (R <= 1)).all():
        raise ValueError(f"accuracy must be a fraction in [0, 1], got {R[~((R >= 0) & (R <= 1))][0]}")
    if not (np.isfinite(w) & (w > 0)).all():
        raise ValueError(f"weights must be finite and above 0, got {w[~(np.isfinite(w) & (w > 0))][0]}")
    return H, R, w


def active_interventions(
    *, estimator: str, policy_loss: str, entropy_coef: float, kl_coef: float, controlled: bool
) -> tuple[str, ...]:
    """What of a run's settings acts on the entropy, so that its law is not the plain one (spec C4).

    Args:
        estimator: Name of the advantage estimator; ``qae`` counts.
        policy_loss: Name of the policy loss; ``clip_cov`` and ``kl_cov`` count.
        entropy_coef: Coefficient of the entropy bonus; any but 0 counts.
        kl_coef: Coefficient of the KL to the reference model; any but 0 counts.
        controlled: Whether a controller holds the entropy at a target.
    """
    found = [estimator] if estimator == "qae" else []
    found += [policy_loss] if policy_loss in ("clip_cov", "kl_cov") else []
    found += ["entropy bonus"] if entropy_coef else []
    found += ["reference KL"] if kl_coef else []
    found += ["entropy controller"] if controlled else []
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyPrediction:
    """The law fitted on the first points, held against the rest (Cui et al. 2.4)."""

    fit: LawFit
    """Of the first points alone."""
    predicted: np.ndarray
    """float64 [n - fit.num_points] accuracies at the later points' entropies."""
    rmse: float
    """Root mean square error over the later points, a fraction."""
    final_error: float
    """Measured minus predicted at the last point, a fraction."""


def predict_early(
    entropy: ArrayLike,
    accuracy: ArrayLike,
    *,
    share: float = EARLY_SHARE,
    steps: Sequence[int] | None = None,
    weights: ArrayLike | None = None,
    interventions: Sequence[str] = (),
) -> EarlyPrediction:
    """Fits the first points (three at least) and predicts the later ones from their entropies.

    Args:
        share: Of the steps up to the last point where `steps` are given, else of the points: ``ceil(share n)``.
        steps: int [n], the step of every point, rising.

    Raises:
        ValueError: no point is left to predict, or as for `fit_law`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share!r}")
    H, R, w = _checked(entropy, accuracy, weights)
    # A share such as 0.15 times 20 must not come to four by the last bit.
    first = math.ceil(share * len(H) - 1e-9)
    if steps is not None:
        first = sum(step <= share * steps[-1] + 1e-9 for step in steps)
    first = max(first, MIN_POINTS)
    if first >= len(H):
        raise ValueError(f"the early prediction needs more than {first} points, got {len(H)}")
    fit = fit_law(H[:first], R[:first], weights=w[:first], interventions=interventions)
    predicted = fit.predict(H[first:])
    errors = R[first:] - predicted
    return EarlyPrediction(
        fit=fit, predicted=predicted, rmse=float(np.sqrt(np.mean(errors**2))), final_error=float(errors[-1])
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LawReport:
    """What one new point says."""

    fit: LawFit | None
    """Of all points so far; None while they are too few or their entropies equal."""
    one_step_error: float | None
    """Measured minus predicted by the fit of the earlier points alone, a fraction."""
    one_step_rmse: float | None
    """Root mean square of `one_step_error` so far."""
    held_against: LawFit | None
    """The law whose ceiling R must not pass; None where none has a ceiling to pass yet."""
    above_ceiling: bool
    """R lies above ceiling + 3 se of `held_against`."""
    broken: bool
    """Event: R has now been above for `patience` points in a row; true once a stretch."""


class LawMonitor:
    """Keeps (step, H, R, number of answers), refits at each point and watches for the law to break (spec C4).

    The law that R is held against is `reference` where one is given (the fit of a plain run), else the fit of this
    run's own points before the current stretch above the ceiling, so that a stretch cannot lift the ceiling it is
    measured by. A fit whose exp(H) spans too little, or that falls with falling entropy, has no ceiling to break.

    Args:
        interventions: As for `fit_law`.
        reference: Law of a run without interventions on the same model and data.
        patience: Points in a row above ceiling + 3 se that make the event.

    Example:
        >>> monitor = LawMonitor()
        >>> report = monitor.add(4, entropy=0.9, accuracy=0.31, num_eval=256)
    """

    def __init__(
        self, *, interventions: Sequence[str] = (), reference: LawFit | None = None, patience: int = 3
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be 1 or above, got {patience!r}")
        self.interventions = tuple(interventions)
        self.reference = reference
        self.patience = patience
        self.points: list[tuple[int, float, float, int]] = []
        """(step, entropy in nats, accuracy as a fraction, evaluated answers), in order of step."""
        self.stretch = 0
        """Points in a row above the ceiling, up to the latest."""
        self._squared_errors: list[float] = []

    def add(self, step: int, entropy: float, accuracy: float, num_eval: int) -> LawReport:
        """Takes the point of one evaluation.

        Raises:
            ValueError: steps out of order or values out of range.
        """
        if self.points and step <= self.points[-1][0]:
            raise ValueError(f"step must be above {self.points[-1][0]}, got {step}")
        if not (math.isfinite(entropy) and entropy >= 0):
            raise ValueError(f"entropy must be finite and 0 or above, got {entropy!r}")
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy must be a fraction in [0, 1], got {accuracy!r}")
        if num_eval < 1:
            raise ValueError(f"num_eval must be 1 or above, got {num_eval!r}")
        before = self._fit(self.points)
        error = None if before is None else accuracy - float(before.predict(entropy))
        if error is not None:
            self._squared_errors.append(error * error)
        held = self._held_against()
        above = held is not None and accuracy > held.ceiling + 3 * held.ceiling_se
        self.stretch = self.stretch + 1 if above else 0
        self.points.append((int(step), float(entropy), float(accuracy), int(num_eval)))
        rmse = math.sqrt(sum(self._squared_errors) / len(self._squared_errors)) if self._squared_errors else None
        return LawReport(
            fit=self._fit(self.points),
            one_step_error=error,
            one_step_rmse=rmse,
            held_against=held,
            above_ceiling=above,
            broken=self.stretch == self.patience,
        )

    def _fit(self, points: Sequence[tuple[int, float, float, int]]) -> LawFit | None:
        if len(points) < MIN_POINTS or len({entropy for _, entropy, _, _ in points}) < 2:
            return None
        _, entropy, accuracy, num_eval = zip(*points, strict=True)
        return fit_law(entropy, accuracy, weights=num_eval, interventions=self.interventions)

    def _held_against(self) -> LawFit | None:
        law = self.reference or self._fit(self.points[: len(self.points) - self.stretch])
        return None if law is None or law.span < MIN_SPAN or law.a <= 0 else law

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as a checkpoint or JSON keeps them."""
        return {
            "points": [list(point) for point in self.points],
            "stretch": self.stretch,
            "squared_errors": list(self._squared_errors),
            "reference": None if self.reference is None else asdict(self.reference),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; interventions and patience stay this run's own."""
        self.points = [(int(s), float(h), float(r), int(n)) for s, h, r, n in state["points"]]
        self.stretch = int(state["stretch"])
        self._squared_errors = [float(error) for error in state["squared_errors"]]
        self.reference = None if state["reference"] is None else LawFit(**state["reference"])
