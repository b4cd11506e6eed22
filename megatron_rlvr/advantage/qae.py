"""Quantile Advantage Estimation, arXiv 2509.22611: the group's K-quantile is the baseline."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig, GateOn
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("qae")
def qae(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """(x - b_K) / (std + eps): hard prompts reinforce their successes only, easy ones punish their failures only.

    x is the correctness (default; the overlong penalty then enters additively) or the shaped reward.
    """
    by_correctness = config.gate_on is GateOn.correctness
    gate = (
        {
            "correctness_N": scored.correctness_N,
            "penalty_N": scored.penalty_N,
            "penalty_additive": config.penalty_additive,
        }
        if by_correctness
        else {}
    )
    return group_advantages(
        scored.rewards_N if by_correctness else scored.shaped_rewards_N,
        scored.group_sizes,
        estimator="qae",
        K=config.K if scored.levels is None else list(scored.levels),
        quantile=config.quantile.value,
        std=config.std.value,
        eps=config.eps,
        mask=config.mask.value,
        gate_on=config.gate_on.value,
        valid_N=scored.valid_N,
        **gate,
    ).numpy()
