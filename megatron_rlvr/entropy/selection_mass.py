"""Scale-free size of a covariance selection: a share of the positive covariance instead of a count (spec G9)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def mass_count(covariances_T: ArrayLike, share: float, *, max_count: int) -> int:
    """Smallest n whose n largest covariances sum to ``share`` of all positive covariance, `max_count` at most.

    Unlike a fixed count or fixed bounds it does not depend on the scale of advantages or covariances: scaling by a
    power of two changes nothing, any other positive factor nothing but rounding. It never reaches beyond the
    positive tokens, and with a share they cannot reach within the cap it is the fixed count `max_count`.

    Args:
        covariances_T: float [T] token covariances (spec B1), finite.
        share: rho in (0, 1].
        max_count: Cap on n, 0 or above, such as the count of the fixed-ratio method.

    Returns:
        n, 0 where no covariance is positive.

    Raises:
        ValueError: share or cap out of range, or a covariance that is not finite.

    Example:
        >>> mass_count([5.0, 3.0, 2.0, -4.0], 0.7, max_count=10)
        2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    if max_count < 0:
        raise ValueError(f"max_count must be 0 or above, got {max_count}")
    covariances = np.asarray(covariances_T, np.float64).ravel()
    if not np.isfinite(covariances).all():
        raise ValueError(f"covariances_T must be finite, got {covariances[~np.isfinite(covariances)][0]}")
    ordered = np.sort(covariances[covariances > 0])[::-1]
    if len(ordered) == 0:
        return 0
    # Divided by a power of two near the largest, so that neither tiny nor huge covariances leave the range of floats.
    mass = np.cumsum(np.ldexp(ordered, -math.frexp(float(ordered[0]))[1]))
    # The last partial sum, not a sum of its own, is the whole: share 1 then reaches it exactly.
    count = int(np.searchsorted(mass, share * mass[-1], side="left")) + 1
    return min(count, max_count)
