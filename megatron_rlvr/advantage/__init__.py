"""Advantage estimators, one a file, by name."""

from megatron_rlvr.advantage import (  # noqa: F401 - they register themselves
    dr_grpo,
    gpg,
    grpo,
    nsr,
    opo,
    psr,
    qae,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    w_reinforce,
)
from megatron_rlvr.advantage.compute import compute_advantages
from megatron_rlvr.advantage.scored import ESTIMATORS, Estimator, ScoredGroups
from megatron_rlvr.advantage.validation import validate_advantage

__all__ = ["ESTIMATORS", "Estimator", "ScoredGroups", "compute_advantages", "validate_advantage"]
