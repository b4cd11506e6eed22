"""On-policy RL with the optimal baseline, arXiv 2505.23585: rewards weighted by response length."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("opo")
def opo(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """R - sum(length R) / sum(length), over the group."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="opo", lengths_N=scored.lengths_N, valid_N=scored.valid_N
    ).numpy()
