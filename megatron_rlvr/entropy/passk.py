"""pass@k without bias, and its confidence interval over problems (spec A11, E6; Chen et al. 2107.03374 Eq 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), the chance that k of the n samples, drawn without replacement, hold a right one.

    Exact rational arithmetic, rounded once.

    Args:
        num_samples: n, samples of the problem.
        num_correct: c in [0, n].
        k: In [1, n].

    Raises:
        ValueError: c or k out of range.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be in [0, {num_samples}], got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in [1, {num_samples}], the samples of a problem, got {k}")
    all_wrong = Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))
    return float(1 - all_wrong)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassAtK:
    """pass@k over a set of problems, as fractions."""

    k: int
    mean: float
    low: float
    """Ends of the confidence interval."""
    high: float
    level: float
    """Its nominal coverage."""
    num_problems: int


def pass_at_k_with_interval(
    num_samples: Sequence[int],
    num_correct: Sequence[int],
    k: int,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PassAtK:
    """Mean pass@k over problems with a percentile bootstrap interval.

    Problems are resampled, for they are what a benchmark has few of (AIME: 30, one problem 3.3 points, spec A11); the
    spread of the samples within a problem is part of the spread between problems. The interval is degenerate where
    all problems have the same pass@k, and says nothing about other problem sets.

    Args:
        num_samples: [P] samples of each problem.
        num_correct: [P] right ones among them.
        k: As for `pass_at_k`; every problem needs k samples or more.
        level: Coverage in (0, 1).
        num_resamples: Bootstrap draws.
        seed: Of the draws; the same seed gives the same interval.

    Raises:
        ValueError: no problems, lists of unequal length, or values out of range.
    """
    if len(num_samples) == 0 or len(num_samples) != len(num_correct):
        raise ValueError(f"num_correct must have one count a problem, got {len(num_correct)} for {len(num_samples)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be 1 or above, got {num_resamples}")
    per_problem = np.array([pass_at_k(int(n), int(c), k) for n, c in zip(num_samples, num_correct, strict=True)])
    num_problems = len(per_problem)
    # Draws of how often each problem comes up, grouped by equal values so that memory stays small for large sets.
    values, counts = np.unique(per_problem, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_problems, counts / num_problems, size=num_resamples)
    means = draws @ values / num_problems
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return PassAtK(
        k=k,
        mean=float(per_problem.mean()),
        low=float(low),
        high=float(high),
        level=level,
        num_problems=num_problems,
    )
