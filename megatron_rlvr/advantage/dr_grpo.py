"""Dr. GRPO, arXiv 2503.20783: no division by the std; goes with aggregation seq-mean-token-sum-norm."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("dr_grpo")
def dr_grpo(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """R - group mean."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="dr_grpo", valid_N=scored.valid_N
    ).numpy()
