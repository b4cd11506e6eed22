"""Entropy set-point controllers as pure maps with explicit state: K alone, or ranked actuators (spec G2, G2b).

Neither claims that its actuators move the entropy. K in particular may have no authority (spec A8), which is why it
ranks last and why saturation is reported instead of hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_rlvr.entropy.schedule import on_grid

ROUNDING = 1e-9
"""Share of an actuator's range taken for the rounding of its sums."""


def smoothed(previous: float | None, measured: float, rho: float) -> float:
    """EMA (1 - rho) previous + rho measured; the first measurement is its start."""
    if not (math.isfinite(measured) and measured >= 0):
        raise ValueError(f"entropy must be finite and 0 or above, got {measured!r}")
    return measured if previous is None else (1 - rho) * previous + rho * measured


def log_error(target: float, ema: float) -> float:
    """log(H* / ema): positive where the entropy is too low; infinite at entropy 0."""
    return math.log(target / ema) if ema > 0 else math.inf


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _require(condition: bool, text: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{text}, got {value!r}")


def _check_loop(target: float, rho: float, deadband: float) -> None:
    _require(math.isfinite(target) and target > 0, "target must be above 0 nats", target)
    _require(0 < rho <= 1, "rho must be in (0, 1]", rho)
    _require(math.isfinite(deadband) and deadband >= 0, "deadband must be 0 or above", deadband)


@dataclass(frozen=True, kw_only=True, slots=True)
class KControllerSettings:
    """What the K controller is told (spec G2)."""

    target: float
    """H*, nats."""
    rho: float = 0.1
    """Weight of the newest entropy in the moving average."""
    gain: float = 0.05
    """dK per unit of log(H* / ema)."""
    deadband: float = 0.05
    """|log error| up to which K stays."""
    k_min: float = 0.2
    k_max: float = 0.8
    max_step: float = 0.05
    """Largest |dK| of one step."""

    def __post_init__(self) -> None:
        _check_loop(self.target, self.rho, self.deadband)
        _require(math.isfinite(self.gain) and self.gain > 0, "gain must be above 0", self.gain)
        _require(0 < self.k_min <= self.k_max < 1, "k_min and k_max must be in (0, 1)", (self.k_min, self.k_max))
        _require(self.max_step > 0, "max_step must be above 0", self.max_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class KControllerState:
    """All that the K controller remembers.

    K itself is the only integrator and never leaves [k_min, k_max], so nothing can wind up: when the error turns, K
    leaves its bound in the same step.
    """

    k: float
    """The level for the next rollout step."""
    ema: float | None = None
    """Moving average of the entropy, nats; None before the first."""
    error: float = 0.0
    """log(H* / ema) of the latest step."""
    saturated: int = 0
    """-1 or 1 where the latest step was cut at k_min or k_max, else 0."""

    @property
    def level(self) -> Fraction:
        """K for the advantage, on the grid of 1e-6 (spec A2)."""
        return on_grid(self.k)


def k_controller_step(settings: KControllerSettings, state: KControllerState, entropy: float) -> KControllerState:
    """One step: K' = clip(K + clip(gain e, +-max_step), k_min, k_max), dK = 0 for |e| <= deadband (spec G2).

    Args:
        entropy: Measured, nats, 0 or above.

    Example:
        >>> settings = KControllerSettings(target=0.3)
        >>> k_controller_step(settings, KControllerState(k=0.4), 0.9).level
        Fraction(7, 20)
    """
    _require(settings.k_min <= state.k <= settings.k_max, "k must be in [k_min, k_max]", state.k)
    ema = smoothed(state.ema, entropy, settings.rho)
    error = log_error(settings.target, ema)
    wanted = state.k
    if abs(error) > settings.deadband:
        wanted += _clip(settings.gain * error, -settings.max_step, settings.max_step)
    k = _clip(wanted, settings.k_min, settings.k_max)
    return KControllerState(k=k, ema=ema, error=error, saturated=(wanted > k) - (wanted < k))


@dataclass(frozen=True, kw_only=True, slots=True)
class Actuator:
    """One knob, scaled so that more of it is meant to raise the entropy (spec G2b).

    For a knob that works the other way the caller hands over its negative.
    """

    name: str
    low: float
    rest: float
    """Value without need of control; for most knobs 0 and equal to `low`."""
    high: float
    gain: float
    """Change per unit of log(H* / ema)."""
    max_step: float
    """Largest change of one step."""

    def __post_init__(self) -> None:
        _require(
            self.low <= self.rest <= self.high and self.low < self.high,
            f"{self.name} must have low <= rest <= high, low < high",
            (self.low, self.rest, self.high),
        )
        _require(math.isfinite(self.high - self.low), f"{self.name} must have finite bounds", (self.low, self.high))
        _require(math.isfinite(self.gain) and self.gain > 0, f"{self.name}'s gain must be above 0", self.gain)
        _require(self.max_step > 0, f"{self.name}'s max_step must be above 0", self.max_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyControllerSettings:
    """Set-point and the actuators in order of rank, surest authority first, K last (spec G2b)."""

    target: float
    """H*, nats."""
    actuators: tuple[Actuator, ...]
    rho: float = 0.1
    deadband: float = 0.05
    patience: int = 1
    """Steps an actuator stands at its bound with the error unmet before the next one takes over."""
    forgetting: float = 0.95
    """Factor per step on past evidence in the estimate of dH/du."""

    def __post_init__(self) -> None:
        _check_loop(self.target, self.rho, self.deadband)
        names = [actuator.name for actuator in self.actuators]
        _require(len(names) > 0, "actuators must hold at least one", names)
        _require(len(set(names)) == len(names), "actuators must have different names", names)
        _require(self.patience >= 1, "patience must be 1 or above", self.patience)
        _require(0 < self.forgetting <= 1, "forgetting must be in (0, 1]", self.forgetting)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActuatorState:
    """One actuator's value and what has been seen of its effect."""

    value: float
    waited: int = 0
    """Steps in a row at the bound towards which the error pushes."""
    last_change: float = 0.0
    """Of `value`, in the latest step."""
    changes_squared: float = 0.0
    """Forgetting sums of du du and du dH, from which `effect` follows."""
    changes_entropy: float = 0.0

    @property
    def effect(self) -> float | None:
        """Estimate of dH/du in nats per unit, by least squares of the entropy's change on the actuator's change one
        step before; None until the actuator has moved. Reported, and not used to size steps: entropy drifts by
        itself, and no step may depend on so confounded a number."""
        return self.changes_entropy / self.changes_squared if self.changes_squared > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyControllerState:
    """All that the controller remembers, actuators in order of rank."""

    actuators: tuple[ActuatorState, ...]
    ema: float | None = None
    last_entropy: float | None = None
    error: float = 0.0
    active: int | None = None
    """Rank of the actuator that the latest step moved or waited on; None within the deadband or when all are spent."""
    saturated: int = 0
    """-1 or 1 where every actuator stands at its bound in that direction and the error is unmet, else 0."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as a checkpoint or JSON keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EntropyControllerState:
        """The state `to_dict` was taken of."""
        actuators = tuple(ActuatorState(**actuator) for actuator in values["actuators"])
        return cls(**{**values, "actuators": actuators})


def initial_state(settings: EntropyControllerSettings) -> EntropyControllerState:
    """Every actuator at rest."""
    return EntropyControllerState(actuators=tuple(ActuatorState(value=a.rest) for a in settings.actuators))


def entropy_controller_step(
    settings: EntropyControllerSettings, state: EntropyControllerState, entropy: float
) -> EntropyControllerState:
    """One step: at most one actuator moves by clip(gain e, +-max_step) within its bounds (spec G2b).

    Which one is split-range control. Actuators off their rest against the need are taken back first, in reverse
    rank and no further than rest; then the first in rank that is not spent is pushed on. One that has stood at its
    bound for `patience` steps is spent and hands over to the next. Values are the only integrators and never leave
    their bounds, so a turned error acts at once (anti-windup).

    Args:
        entropy: Measured, nats, 0 or above.

    Raises:
        ValueError: the state is not one of these settings, or the entropy is out of range.
    """
    _check_state(settings, state)
    ema = smoothed(state.ema, entropy, settings.rho)
    error = log_error(settings.target, ema)
    actuators = _learnt(settings, state, entropy)
    direction = 0 if abs(error) <= settings.deadband else (1 if error > 0 else -1)
    active: int | None = None
    saturated = 0
    if direction == 0:
        actuators = [replace(actuator, waited=0) for actuator in actuators]
    else:
        active = _moved(settings, actuators, error, direction)
        spent = all(
            s.value == (a.high if direction > 0 else a.low) for a, s in zip(settings.actuators, actuators, strict=True)
        )
        saturated = direction if spent else 0
    return EntropyControllerState(
        actuators=tuple(actuators),
        ema=ema,
        last_entropy=entropy,
        error=error,
        active=active,
        saturated=saturated,
    )


def _check_state(settings: EntropyControllerSettings, state: EntropyControllerState) -> None:
    counts = (len(settings.actuators), len(state.actuators))
    _require(counts[0] == counts[1], "the state must have one value an actuator", counts)
    for actuator, current in zip(settings.actuators, state.actuators, strict=True):
        bounds = f"[{actuator.low}, {actuator.high}]"
        _require(actuator.low <= current.value <= actuator.high, f"{actuator.name} must be in {bounds}", current.value)


def _learnt(settings: EntropyControllerSettings, state: EntropyControllerState, entropy: float) -> list[ActuatorState]:
    """The latest step's changes entered into the estimates of dH/du, and cleared."""
    if state.last_entropy is None:
        return list(state.actuators)
    change = entropy - state.last_entropy
    return [
        replace(
            actuator,
            last_change=0.0,
            changes_squared=settings.forgetting * actuator.changes_squared + actuator.last_change**2,
            changes_entropy=settings.forgetting * actuator.changes_entropy + actuator.last_change * change,
        )
        for actuator in state.actuators
    ]


def _moved(
    settings: EntropyControllerSettings, actuators: list[ActuatorState], error: float, direction: int
) -> int | None:
    """Moves one of `actuators` in place and gives its rank; None when all are spent."""
    order = range(len(actuators))
    for rank in reversed(order):
        rest = settings.actuators[rank].rest
        if (rest - actuators[rank].value) * direction > 0:
            actuators[rank] = _step(settings.actuators[rank], actuators[rank], error, rest)
            return rank
    for rank in order:
        actuator, current = settings.actuators[rank], actuators[rank]
        bound = actuator.high if direction > 0 else actuator.low
        if current.value != bound:
            actuators[rank] = _step(actuator, current, error, bound)
            return rank
        # An actuator that rests at its bound has nothing to give in this direction, and nothing to wait for.
        if bound != actuator.rest and current.waited < settings.patience:
            actuators[rank] = replace(current, waited=current.waited + 1)
            return rank
    return None


def _step(actuator: Actuator, current: ActuatorState, error: float, limit: float) -> ActuatorState:
    """Towards `limit` and not past it."""
    wanted = current.value + _clip(actuator.gain * error, -actuator.max_step, actuator.max_step)
    value = min(wanted, limit) if error > 0 else max(wanted, limit)
    # Sums of steps such as .1 stop a bit short of a bound they should reach; no step may be spent on that bit.
    if abs(limit - value) <= ROUNDING * (actuator.high - actuator.low):
        value = limit
    return replace(current, value=value, waited=0, last_change=value - current.value)


def values_of(settings: EntropyControllerSettings, state: EntropyControllerState) -> dict[str, float]:
    """The actuators' values by name, for the step that follows."""
    return {a.name: s.value for a, s in zip(settings.actuators, state.actuators, strict=True)}


def rank_by_authority(names: Sequence[str]) -> tuple[str, ...]:
    """The spec's rank of known actuators, surest first (G2b): entropy bonus, whose first-order effect is certain,
    KL-Cov, Clip-Cov, eps_high, and K, which may have no authority at all.

    Raises:
        ValueError: an unknown name.
    """
    order = ("entropy_coef", "kl_cov", "clip_cov", "eps_high", "K")
    unknown = [name for name in names if name not in order]
    _require(not unknown, f"actuators must be among {', '.join(order)}", unknown)
    return tuple(sorted(names, key=order.index))
