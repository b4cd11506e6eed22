"""Metrics that carry their reduction, so that ranks and micro-batches merge without guessing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LAW_ENTROPY_KEYS = ("entropy/sequence_mean", "entropy/mean")
"""Metrics that the law R = -a exp(H) + b takes its entropy from: as the paper has it or, where a run has not, over
tokens."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean, kept as sum and weight (fp64)."""

    total: float
    weight: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True, slots=True)
class Sum:
    """Plain sum."""

    total: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True, slots=True)
class Max:
    """Largest value seen."""

    largest: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


@dataclass(frozen=True, slots=True)
class Min:
    """Smallest value seen."""

    smallest: float

    def merge(self, other: Min) -> Min:
        return Min(min(self.smallest, other.smallest))

    @property
    def value(self) -> float:
        return self.smallest


@dataclass(frozen=True, slots=True)
class EffectiveShare:
    """Kish's effective sample size of weights w as a share of their number: (sum w)^2 / (n sum w^2), in (0, 1]."""

    total: float
    squares: float
    count: float

    def merge(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total**2 / (self.count * self.squares) if self.squares else math.nan


Metric = Mean | Sum | Max | Min | EffectiveShare


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merges metric dictionaries key by key.

    Raises:
        ValueError: one key with two different reductions.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for key, metric in part.items():
            present = merged.get(key)
            if present is None:
                merged[key] = metric
            elif type(present) is type(metric):
                merged[key] = present.merge(metric)  # type: ignore[arg-type]
            else:
                raise ValueError(
                    f"metric {key!r} must have one reduction, got {type(present).__name__} and {type(metric).__name__}"
                )
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers of a metric dictionary."""
    return {key: metric.value for key, metric in metrics.items()}
