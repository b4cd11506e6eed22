"""Group Relative Policy Optimization, arXiv 2402.03300."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("grpo")
def grpo(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """(R - group mean) / (group std + eps)."""
    return group_advantages(
        scored.shaped_rewards_N,
        scored.group_sizes,
        estimator="grpo",
        std=config.std.value,
        eps=config.eps,
        valid_N=scored.valid_N,
    ).numpy()
