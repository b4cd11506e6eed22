"""Group policy gradient, arXiv 2504.02546: the group mean as baseline, rescaled for the rewards that are 0."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("gpg")
def gpg(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """(R - group mean) B / (number of rewards that are not 0), over the B responses of the batch."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="gpg", valid_N=scored.valid_N
    ).numpy()
