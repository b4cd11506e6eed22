"""Positive sample reinforcement, arXiv 2506.01347: right answers are reinforced, wrong ones ignored."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("psr")
def psr(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """R, without a baseline."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="psr", valid_N=scored.valid_N
    ).numpy()
