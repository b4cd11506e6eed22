"""The regime of a group by its correctness: hard where the K-quantile is 0, easy where it is 1 (spec A1, A2)."""

from __future__ import annotations

from fractions import Fraction

from megatron_rlvr.ops.exact import quantile_rank
from megatron_rlvr.types import RolloutGroup

HARD, EASY, DEGENERATE = "hard", "easy", "degenerate"


def group_regime(group: RolloutGroup, level: Fraction) -> str:
    """``hard``, ``easy``, or ``degenerate`` (all right, all wrong, or fewer than two valid responses).

    Args:
        level: K in (0, 1); hard where at least ceil(K G) of the G valid responses are wrong.
    """
    right = [rollout.correctness > 0.5 for rollout in group.rollouts if rollout.valid]
    num_right, size = sum(right), len(right)
    if size < 2 or num_right in (0, size):
        return DEGENERATE
    return HARD if size - num_right >= quantile_rank(level, size) else EASY
