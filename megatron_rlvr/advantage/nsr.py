"""Negative sample reinforcement, arXiv 2506.01347: wrong answers are punished, right ones ignored."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("nsr")
def nsr(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """R - 1."""
    return group_advantages(
        scored.shaped_rewards_N, scored.group_sizes, estimator="nsr", valid_N=scored.valid_N
    ).numpy()
