"""REINFORCE++, arXiv 2501.03262: no group baseline, whitening over the tokens of the whole batch."""

import numpy as np

from megatron_rlvr.advantage.scored import ESTIMATORS, ScoredGroups
from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.ops import group_advantages


@ESTIMATORS.register("reinforce_pp")
def reinforce_pp(scored: ScoredGroups, config: AdvantageConfig) -> np.ndarray:
    """(R - token mean) / sqrt(unbiased token variance + 1e-8); the return without discount is R on every token."""
    return group_advantages(
        scored.shaped_rewards_N,
        scored.group_sizes,
        estimator="reinforce_pp",
        lengths_N=scored.lengths_N,
        valid_N=scored.valid_N,
    ).numpy()
