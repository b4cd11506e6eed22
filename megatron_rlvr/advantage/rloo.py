"""REINFORCE leave-one-out, arXiv 2402.14740."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("rloo")
def rloo(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """R - mean of the other responses of the group."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="rloo", valid_N=scored.valid_N
    ).numpy()
