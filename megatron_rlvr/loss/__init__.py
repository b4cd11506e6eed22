"""Policy losses, one a file, by name; aggregation and the reference KL."""

from megatron_rlvr.loss import cispo, clip_cov, gspo, kl_cov, ppo  # noqa: F401 - they register themselves
from megatron_rlvr.loss.aggregation import token_weights
from megatron_rlvr.loss.kl import reference_kl
from megatron_rlvr.loss.policy import LOSSES, LossTokens, PolicyLoss
from megatron_rlvr.loss.validation import validate_loss

__all__ = ["LOSSES", "LossTokens", "PolicyLoss", "reference_kl", "token_weights", "validate_loss"]
