"""REINFORCE++-Baseline, arXiv 2501.03262: the group mean as baseline, whitened over the tokens of the whole batch."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("reinforce_pp_baseline")
def reinforce_pp_baseline(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """(x - token mean) / sqrt(unbiased token variance + 1e-8) of x = R - group mean."""
    return group_advantages(
        scored.shaped_rewards_N,
        scored.group_sizes,
        estimator="reinforce_pp_baseline",
        lengths_N=scored.lengths_N,
        valid_N=scored.valid_N,
    ).numpy()
