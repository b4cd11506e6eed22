"""Upper tail of the F distribution, for the law's test against a constant; numpy alone has none."""

from __future__ import annotations

import math


def f_survival(statistic: float, dof_1: int, dof_2: int) -> float:
    """P(F >= statistic) for F(dof_1, dof_2) = I_x(dof_2 / 2, dof_1 / 2) at x = dof_2 / (dof_2 + dof_1 F).

    Raises:
        ValueError: the statistic is negative or not a number, or a degree of freedom is below 1.
    """
    if not statistic >= 0:
        raise ValueError(f"statistic must be 0 or above, got {statistic!r}")
    if dof_1 < 1 or dof_2 < 1:
        raise ValueError(f"degrees of freedom must be 1 or above, got {dof_1} and {dof_2}")
    if math.isinf(statistic):
        return 0.0
    return regularised_beta(dof_2 / (dof_2 + dof_1 * statistic), dof_2 / 2, dof_1 / 2)


def regularised_beta(x: float, p: float, q: float) -> float:
    """I_x(p, q) for x in [0, 1] and p, q > 0 (DLMF 8.17.22, continued fraction by Lentz's method).

    Example:
        >>> round(regularised_beta(0.3, 1, 1), 12)
        0.3
    """
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    # The fraction converges fast below the distribution's mean; above it the mirror image is used.
    if x > (p + 1) / (p + q + 2):
        return 1.0 - regularised_beta(1 - x, q, p)
    log_front = math.lgamma(p + q) - math.lgamma(p) - math.lgamma(q) + p * math.log(x) + q * math.log1p(-x)
    return math.exp(log_front) / p * _continued_fraction(x, p, q)


def _continued_fraction(x: float, p: float, q: float) -> float:
    tiny = 1e-300
    c = 1.0
    d = 1.0 / (1.0 - (p + q) * x / (p + 1) or tiny)
    value = d
    for m in range(1, 1000):
        for coefficient in (
            m * (q - m) * x / ((p + 2 * m - 1) * (p + 2 * m)),
            -(p + m) * (p + q + m) * x / ((p + 2 * m) * (p + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + coefficient * d or tiny)
            c = 1.0 + coefficient / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function must converge, got x={x}, p={p}, q={q}")
