"""What an estimator sees of a batch: scores, no tokens.

Letters: N responses of all groups, group after group; G responses of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_rlvr.config.schema import AdvantageConfig
from megatron_rlvr.registry import Registry
from megatron_rlvr.types import RolloutGroup


@dataclass(kw_only=True, slots=True)
class ScoredGroups:
    """Scores of the responses of one rollout batch.

    Example:
        >>> scored = ScoredGroups.from_groups(groups)
        >>> advantages_N = ESTIMATORS.get("grpo")(scored, config)
    """

    group_sizes: list[int]
    """Responses of each group."""
    rewards_N: np.ndarray
    """float64 [N] raw rewards, on the 0..1 scale of the verifiers."""
    penalty_N: np.ndarray
    """float64 [N] overlong penalties <= 0 on the +-1 scale."""
    correctness_N: np.ndarray
    """float64 [N] 1 right, 0 wrong."""
    lengths_N: np.ndarray
    """int64 [N] response tokens."""
    valid_N: np.ndarray
    """bool [N]; an aborted response counts nowhere."""
    levels: Sequence[Fraction] | None = None
    """Quantile level K of every group; None for the section's own throughout."""

    @classmethod
    def from_groups(cls, groups: list[RolloutGroup], *, levels: Sequence[Fraction] | None = None) -> ScoredGroups:
        """Flattens rollout groups."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return cls(
            group_sizes=[len(group.rollouts) for group in groups],
            rewards_N=np.array([rollout.reward for rollout in rollouts], dtype=np.float64),
            penalty_N=np.array([rollout.penalty for rollout in rollouts], dtype=np.float64),
            correctness_N=np.array([rollout.correctness for rollout in rollouts], dtype=np.float64),
            lengths_N=np.array([len(rollout.response_ids) for rollout in rollouts], dtype=np.int64),
            valid_N=np.array([rollout.valid for rollout in rollouts], dtype=bool),
            levels=levels,
        )

    @property
    def shaped_rewards_N(self) -> np.ndarray:
        """float64 [N] rewards with half the penalty: 2 x - 1 of it is DAPO's +-1 score plus penalty (spec A9)."""
        return self.rewards_N + self.penalty_N / 2


Estimator = Callable[[ScoredGroups, AdvantageConfig], np.ndarray]
"""From scores to float64 [N] advantages, 0 for invalid responses."""

ESTIMATORS: Registry[Estimator] = Registry("advantage.estimator")
