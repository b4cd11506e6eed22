"""Schedules of the quantile level K over rollout steps, and the dithered rank (spec G1, G2).

A schedule is a pure function of the step, so that a resumed run goes on with the same K. Levels are exact rationals:
QAE's rank m = ceil(K G) flips with the last bit of a float (spec A2), so computed levels are rounded to a grid of 1e-6.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

GRID = 10**6
"""Levels are multiples of 1 / GRID."""

Level = str | int | float | Fraction


def on_grid(level: float | Fraction) -> Fraction:
    """The multiple of 1e-6 nearest to a computed level; a float counts as its shortest decimal (spec A2).

    Example:
        >>> on_grid(0.1 + 0.2)
        Fraction(3, 10)
    """
    exact = Fraction(repr(level)) if isinstance(level, float) else level
    return Fraction(round(exact * GRID), GRID)


def _level(value: Level, *, name: str) -> Fraction:
    """A level the user wrote, exact and off the grid if they wish (1/3 stays 1/3)."""
    try:
        level = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name} must be a number or a string like '0.4' or '2/5', got {value!r}") from None
    if not 0 < level < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return level


def _check_step(step: int, *, name: str) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{name} must be an integer, 0 or above, got {step!r}")
    return step


class KSchedule(Protocol):
    """K as a function of the rollout step."""

    def at(self, step: int) -> Fraction:
        """The level K in (0, 1) of rollout step `step` (0 or above), an exact rational."""
        ...


class ConstantK:
    """The same K throughout (spec A6: 0.4 is the paper's)."""

    def __init__(self, level: Level) -> None:
        self.level = _level(level, name="K")

    def at(self, step: int) -> Fraction:
        _check_step(step, name="step")
        return self.level


class PiecewiseLinearK:
    """Straight lines between given points, flat before the first and behind the last (spec G1).

    Args:
        points: (step, level) in ascending order of step, at least one.

    Example:
        >>> PiecewiseLinearK([(0, "0.6"), (100, "0.4")]).at(25)
        Fraction(11, 20)
    """

    def __init__(self, points: Sequence[tuple[int, Level]]) -> None:
        if not points:
            raise ValueError("points must hold at least one (step, level), got none")
        self.points = [(_check_step(s, name="points' step"), _level(k, name="points' level")) for s, k in points]
        steps = [step for step, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"points must be in ascending order of step, got steps {steps}")

    def at(self, step: int) -> Fraction:
        _check_step(step, name="step")
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (left, low), (right, high) in pairwise(self.points):
            if step < right:
                # At a point itself the user's own level comes back, not its neighbour on the grid.
                return low if step == left else on_grid(low + (high - low) * Fraction(step - left, right - left))
        return self.points[-1][1]


class CosineK:
    """Half a cosine from one level to another over ``[first_step, last_step]``, flat outside (spec G1)."""

    def __init__(self, start: Level, end: Level, *, first_step: int = 0, last_step: int) -> None:
        self.start, self.end = _level(start, name="start"), _level(end, name="end")
        self.first_step = _check_step(first_step, name="first_step")
        self.last_step = _check_step(last_step, name="last_step")
        if last_step <= first_step:
            raise ValueError(f"last_step must be above first_step {first_step}, got {last_step}")

    def at(self, step: int) -> Fraction:
        _check_step(step, name="step")
        if step <= self.first_step:
            return self.start
        if step >= self.last_step:
            return self.end
        done = (step - self.first_step) / (self.last_step - self.first_step)
        # The grid also hides the last bit, in which mathematics libraries differ.
        return on_grid(self.end + (self.start - self.end) * Fraction((1 + math.cos(math.pi * done)) / 2))


class TwoPhaseK:
    """One level before ``switch_step``, another from it on, such as .6 then .4 (spec G1)."""

    def __init__(self, first: Level, second: Level, *, switch_step: int) -> None:
        self.first, self.second = _level(first, name="first"), _level(second, name="second")
        self.switch_step = _check_step(switch_step, name="switch_step")

    def at(self, step: int) -> Fraction:
        return self.first if _check_step(step, name="step") < self.switch_step else self.second


@dataclass(frozen=True, kw_only=True, slots=True)
class DitheredRank:
    """The two ranks between which a group's rank is drawn (spec G2).

    Example:
        >>> dithered_rank(Fraction(2, 5), 8)
        DitheredRank(low=3, high=4, prob_high=Fraction(1, 5))
    """

    low: int
    """floor(K G), 1 at least."""
    high: int
    prob_high: Fraction
    """Probability of `high`; the fractional part of K G."""

    def draw(self, *, seed: int, step: int, group: int) -> int:
        """The rank of one group, a pure function of its arguments (64-bit integers, 0 or above), on any machine.

        The comparison is between integers: with u uniform over 64 bits, `high` iff u < prob_high 2^64.
        """
        counter = b"".join(value.to_bytes(8, "little") for value in (seed, step, group))
        uniform = int.from_bytes(hashlib.blake2b(counter, digest_size=8, person=b"qae rank").digest(), "little")
        is_high = uniform * self.prob_high.denominator < self.prob_high.numerator << 64
        return self.high if is_high else self.low


def dithered_rank(level: Fraction, group_size: int) -> DitheredRank:
    """Ranks m with E[m] = K G, so that K acts below the resolution 1/G of ceil(K G) (spec G2).

    Below K = 1/G there is no lower rank than 1, and the mean is 1 instead of K G. The mean differs from the
    undithered rank ceil(K G) by up to one: dithering at the same K moves the gate to lower ranks.

    Args:
        level: K in (0, 1).
        group_size: G, the valid responses of the group, 1 or above.
    """
    if not 0 < level < 1:
        raise ValueError(f"K must be in (0, 1), got {level}")
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or above, got {group_size}")
    product = level * group_size
    low = math.floor(product)
    if low == 0:
        return DitheredRank(low=1, high=1, prob_high=Fraction(0))
    part = product - low
    return DitheredRank(low=low, high=low + 1 if part else low, prob_high=part)
