"""Advantage estimators, one a file, by name."""

from megatron_rlvr.advantage import dr_grpo, grpo, qae, reinforce_pp, rloo  # noqa: F401 - they register themselves
from megatron_rlvr.advantage.compute import compute_advantages, validate_advantage
from megatron_rlvr.advantage.scored import ESTIMATORS, Estimator, ScoredGroups

__all__ = ["ESTIMATORS", "Estimator", "ScoredGroups", "compute_advantages", "validate_advantage"]
