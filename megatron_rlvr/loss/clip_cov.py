"""Clip-Cov, arXiv 2505.22617: a random few of the tokens with high covariance get no gradient."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES
from megatron_rlvr.metrics import Metric
from megatron_rlvr.ops import policy_loss


@LOSSES.register("clip_cov")
def clip_cov(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    selected_T: torch.Tensor | None,
    config: LossConfig,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The clipped surrogate, value and gradient 0 on the selected tokens."""
    return policy_loss(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T,
        loss="clip_cov",
        selected_T=selected_T,
        eps_low=config.clip_cov.eps_low,
        eps_high=config.clip_cov.eps_high,
        logratio_clamp=config.logratio_clamp,
    )
