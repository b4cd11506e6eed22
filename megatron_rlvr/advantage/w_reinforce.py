"""Weighted REINFORCE, arXiv 2506.01347: punishment of wrong answers with a little reinforcement of right ones."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("w_reinforce")
def w_reinforce(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """positive_weight for right answers, -1 for wrong ones."""
    return group_advantages(
        scored.correctness_N,
        scored.group_sizes,
        estimator="w_reinforce",
        positive_weight=config.positive_weight,
        valid_N=scored.valid_N,
    ).numpy()
