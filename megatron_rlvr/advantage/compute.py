"""From rollout groups to advantages, with the metrics of the batch."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig, GateOn, QaeMask, Quantile, Std
from megatron_rlvr.metrics import Max, Mean, Metric
from megatron_rlvr.ops.checks import check_not_negative
from megatron_rlvr.ops.exact import parse_quantile_level, quantile_rank
from megatron_rlvr.types import RolloutGroup

# Fields of AdvantageConfig that act on each built-in estimator, besides `estimator` itself.
FIELDS_OF = {
    "qae": ("K", "quantile", "std", "eps", "gate_on", "penalty_additive", "mask"),
    "grpo": ("std", "eps"),
    "dr_grpo": (),
    "rloo": (),
    "reinforce_pp": (),
}


def compute_advantages(
    groups: list[RolloutGroup], config: AdvantageConfig
) -> tuple[list[np.ndarray], dict[str, Metric]]:
    """Advantages of every response.

    Args:
        groups: scored rollout groups, of any sizes.
        config: estimator and options, checked by `validate_advantage`.

    Returns:
        One float64 [G] per group (0 for aborted responses, which count nowhere), and the metrics
        ``advantage/zero_fraction``, ``advantage/mean_abs``, ``advantage/max_abs`` over valid responses and
        ``advantage/degenerate_fraction`` (all right, all wrong, or fewer than two valid), for qae also
        ``advantage/hard_fraction`` and ``advantage/easy_fraction``, over groups.
    """
    scored = ScoredGroups.from_groups(groups)
    advantages_N = np.asarray(ESTIMATORS.get(config.estimator)(scored, config), dtype=np.float64)
    if advantages_N.shape != scored.rewards_N.shape or not np.isfinite(advantages_N).all():
        raise ValueError(
            f"advantage.estimator {config.estimator!r} must return {len(scored.rewards_N)} finite numbers, "
            f"got shape {list(advantages_N.shape)}"
        )
    borders = np.concatenate([[0], np.cumsum(scored.group_sizes, dtype=np.int64)])
    per_group = [advantages_N[start:stop] for start, stop in itertools.pairwise(borders)]
    return per_group, _response_metrics(advantages_N[scored.valid_N]) | _regime_metrics(scored, config)


def validate_advantage(config: AdvantageConfig) -> None:
    """Checks the section on its own.

    Raises:
        ValueError: unknown estimator, bad value, or an option that the estimator would ignore.
    """
    ESTIMATORS.get(config.estimator)
    _check_values(config)
    known = FIELDS_OF.get(config.estimator)
    if known is None:
        return  # A plugin reads what it likes.
    default = AdvantageConfig()
    for field in fields(AdvantageConfig):
        name = field.name
        if name != "estimator" and name not in known and getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"advantage.{name} has no effect with advantage.estimator={config.estimator}, "
                f"got {_shown(getattr(config, name))!r}"
            )
    if config.estimator == "grpo" and config.std is Std.none:
        raise ValueError("advantage.std must be sample or population with grpo (dr_grpo is without), got 'none'")
    if config.estimator == "qae":
        _check_qae(config)


def _check_values(config: AdvantageConfig) -> None:
    try:
        parse_quantile_level(config.K)
    except (TypeError, ValueError) as error:
        raise ValueError(f"advantage.{error}") from None
    check_not_negative(config.eps, name="advantage.eps")


def _check_qae(config: AdvantageConfig) -> None:
    if config.gate_on is GateOn.reward and not config.penalty_additive:
        raise ValueError("advantage.penalty_additive has no effect with advantage.gate_on=reward, got False")
    if config.mask is not QaeMask.qae and config.gate_on is GateOn.reward:
        raise ValueError(
            f"advantage.mask must be qae with advantage.gate_on=reward, whose rewards may have more than two values, "
            f"got {config.mask.value!r}"
        )
    if config.mask is not QaeMask.qae and config.quantile is Quantile.linear:
        raise ValueError(
            "advantage.mask must be qae with advantage.quantile=linear, which has no regimes, "
            f"got {config.mask.value!r}"
        )


def _shown(value: object) -> object:
    return value.value if isinstance(value, GateOn | QaeMask | Quantile | Std) else value


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
    level = parse_quantile_level(config.K)
    for start, stop in itertools.pairwise(borders):
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
