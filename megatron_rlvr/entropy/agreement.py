"""How well predicted entropy changes agree with measured ones over a window of steps (spec C3)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Predicted against measured changes; NaN where the window does not determine a number."""

    correlation: float
    """Pearson's."""
    slope: float
    """Of measured on predicted, least squares with an intercept."""
    ratio: float
    """sum measured / sum predicted; only P4 against M1 is expected near 1 (spec C3)."""
    sign_agreement: float
    """Share of the steps, among those where both changes are not 0, in which the signs are equal."""
    num_steps: int


def agreement(predicted: ArrayLike, measured: ArrayLike) -> Agreement:
    """Agreement of two series of entropy changes, float [n] each, same unit (nats for `ratio` to mean anything).

    Raises:
        ValueError: unequal lengths or a value that is not finite.
    """
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if p.ndim != 1 or p.shape != m.shape:
        raise ValueError(f"predicted and measured must be [n], got {list(p.shape)} and {list(m.shape)}")
    if not (np.isfinite(p).all() and np.isfinite(m).all()):
        raise ValueError("predicted and measured must be finite, got a value that is not")
    if len(p) == 0:
        return Agreement(correlation=math.nan, slope=math.nan, ratio=math.nan, sign_agreement=math.nan, num_steps=0)
    dp, dm = p - p.mean(), m - m.mean()
    spp, smm, spm = float(dp @ dp), float(dm @ dm), float(dp @ dm)
    total = float(p.sum())
    moving = (p != 0) & (m != 0)
    return Agreement(
        correlation=spm / math.sqrt(spp) / math.sqrt(smm) if spp > 0 and smm > 0 else math.nan,
        slope=spm / spp if spp > 0 else math.nan,
        ratio=float(m.sum()) / total if total else math.nan,
        sign_agreement=float((np.sign(p) == np.sign(m))[moving].mean()) if moving.any() else math.nan,
        num_steps=len(p),
    )


class AgreementWindow:
    """The latest pairs of predicted and measured change.

    Example:
        >>> window = AgreementWindow(size=50)
        >>> window.add(-0.010, -0.011).ratio
        1.1
    """

    def __init__(self, *, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or above, got {size}")
        self._pairs: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, predicted: float, measured: float) -> Agreement:
        """Takes one step's pair (nats) and gives the agreement over the window.

        Raises:
            ValueError: a value is not finite; the window stays as it was.
        """
        if not (math.isfinite(predicted) and math.isfinite(measured)):
            raise ValueError(f"predicted and measured must be finite, got {predicted!r} and {measured!r}")
        self._pairs.append((float(predicted), float(measured)))
        p, m = zip(*self._pairs, strict=True)
        return agreement(p, m)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, as a checkpoint or JSON keeps them."""
        return {"pairs": [list(pair) for pair in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`; of a longer window the latest pairs that fit are kept."""
        self._pairs.clear()
        self._pairs.extend((float(p), float(m)) for p, m in state["pairs"])
