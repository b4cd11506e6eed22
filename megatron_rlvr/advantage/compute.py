"""From rollout groups to advantages, with the metrics of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.metrics import Max, Mean, Metric
from megatron_rlvr.ops.exact import parse_quantile_level, quantile_rank
from megatron_rlvr.types import RolloutGroup


def compute_advantages(
    groups: list[RolloutGroup], config: AdvantageConfig, *, levels: Sequence[Fraction] | None = None
) -> tuple[list[np.ndarray], dict[str, Metric]]:
    """Advantages of every response.

    Args:
        groups: scored rollout groups, of any sizes.
        config: estimator and options, checked by `validate_advantage`.
        levels: K of every group for qae, as `megatron_rlvr.advantage.levels` decides it; None for `config.K`.

    Returns:
        One float64 [G] per group (0 for aborted responses, which count nowhere), and the metrics
        ``advantage/zero_fraction``, ``advantage/mean_abs``, ``advantage/max_abs`` over valid responses and
        ``advantage/degenerate_fraction`` (all right, all wrong, or fewer than two valid), for qae also
        ``advantage/hard_fraction`` and ``advantage/easy_fraction``, over groups.
    """
    scored = ScoredGroups.from_groups(groups, levels=levels)
    advantages_N = np.asarray(ESTIMATORS.get(config.estimator)(scored, config), dtype=np.float64)
    if advantages_N.shape != scored.rewards_N.shape or not np.isfinite(advantages_N).all():
        raise ValueError(
            f"advantage.estimator {config.estimator!r} must return {len(scored.rewards_N)} finite numbers, "
            f"got shape {list(advantages_N.shape)}"
        )
    borders = np.concatenate([[0], np.cumsum(scored.group_sizes, dtype=np.int64)])
    per_group = [advantages_N[start:stop] for start, stop in itertools.pairwise(borders)]
    return per_group, _response_metrics(advantages_N[scored.valid_N]) | _regime_metrics(scored, config)


def _response_metrics(advantages_N: np.ndarray) -> dict[str, Metric]:
    count = float(len(advantages_N))
    metrics: dict[str, Metric] = {
        "advantage/zero_fraction": Mean(float((advantages_N == 0).sum()), count),
        "advantage/mean_abs": Mean(float(np.abs(advantages_N).sum()), count),
    }
    if count:
        metrics["advantage/max_abs"] = Max(float(np.abs(advantages_N).max()))
    return metrics


def _regime_metrics(scored: ScoredGroups, config: AdvantageConfig) -> dict[str, Metric]:
    """Shares of groups by regime of the correctness: hard where at least ceil(K G) are wrong (spec A2)."""
    counts = {"hard": 0, "easy": 0, "degenerate": 0}
    borders = np.concatenate([[0], np.cumsum(scored.group_sizes, dtype=np.int64)])
    levels = scored.levels or [parse_quantile_level(config.K)] * len(scored.group_sizes)
    for (start, stop), level in zip(itertools.pairwise(borders), levels, strict=True):
        right_G = scored.correctness_N[start:stop][scored.valid_N[start:stop]] > 0.5
        num_right, size = int(right_G.sum()), len(right_G)
        if size < 2 or num_right in (0, size):
            counts["degenerate"] += 1
        elif size - num_right >= quantile_rank(level, size):
            counts["hard"] += 1
        else:
            counts["easy"] += 1
    shown = counts if config.estimator == "qae" else {"degenerate": counts["degenerate"]}
    return {
        f"advantage/{name}_fraction": Mean(float(count), float(len(scored.group_sizes)))
        for name, count in shown.items()
    }
