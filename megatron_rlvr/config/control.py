"""What changes over a run: the schedule of K, and the entropy controller."""

from dataclasses import dataclass, field
from enum import Enum

MISSING = "???"


class KCourse(Enum):
    """How K goes over rollout steps, from `advantage.K` on."""

    constant = "constant"
    piecewise = "piecewise"
    cosine = "cosine"
    two_phase = "two_phase"


@dataclass(kw_only=True, slots=True)
class KPoint:
    step: int = MISSING  # type: ignore[assignment]
    K: str = MISSING


@dataclass(kw_only=True, slots=True)
class KScheduleConfig:
    """K as a function of the rollout step (the first is 1); it changes a group only where ceil(K G) changes.

    That K moves the entropy is not implied: on policy the baseline has no first-order effect on it.
    """

    kind: KCourse = KCourse.constant
    points: list[KPoint] = field(default_factory=list)
    """piecewise: straight lines between them, flat outside; `advantage.K` is not read."""
    end: str | None = None
    """cosine and two_phase: the level at the end."""
    first_step: int = 1
    """cosine: the last step with `advantage.K`."""
    last_step: int | None = None
    """cosine: the first step with `end`."""
    switch_step: int | None = None
    """two_phase: the first step with `end`."""


@dataclass(kw_only=True, slots=True)
class SourceLevel:
    """The quantile level of one data source."""

    source: str = MISSING
    K: str = MISSING


class ActuatorName(Enum):
    """Knobs of the entropy controller in order of rank: the surest authority over the entropy first, K last."""

    entropy_coef = "entropy_coef"
    kl_cov = "kl_cov"
    clip_cov = "clip_cov"
    eps_high = "eps_high"
    K = "K"


@dataclass(kw_only=True, slots=True)
class ActuatorConfig:
    """One knob: `loss.entropy_coef`, `loss.kl_cov.ratio`, `loss.clip_cov.ratio`, the loss's own eps_high, or
    `advantage.K`. It starts from, and returns to, the value of that setting."""

    name: ActuatorName = MISSING  # type: ignore[assignment]
    low: float = MISSING  # type: ignore[assignment]
    high: float = MISSING  # type: ignore[assignment]
    gain: float = MISSING  # type: ignore[assignment]
    """Change per unit of log(target / entropy)."""
    max_step: float = MISSING  # type: ignore[assignment]
    """Largest change of one rollout step."""


@dataclass(kw_only=True, slots=True)
class ControllerConfig:
    """Holds the entropy at a set-point by at most one knob a rollout step; off without `target_entropy`."""

    target_entropy: float | None = None
    """Nats, of entropy/mean."""
    rho: float = 0.1
    """Weight of the newest entropy in the moving average."""
    deadband: float = 0.05
    """|log(target / average)| up to which nothing moves."""
    patience: int = 1
    """Steps that an actuator stands at its bound with the error unmet before the next in rank takes over."""
    forgetting: float = 0.95
    """Factor per step on past evidence in the reported estimate of every actuator's effect."""
    actuators: list[ActuatorConfig] = field(default_factory=list)
