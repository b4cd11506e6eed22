"""Clip-Cov, arXiv 2505.22617: a random few of the tokens with high covariance get no gradient."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES, LossTokens, fused
from megatron_rlvr.metrics import Metric


@LOSSES.register("clip_cov")
def clip_cov(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The clipped surrogate, value and gradient 0 on the selected tokens."""
    return fused(
        tokens,
        "clip_cov",
        eps_low=config.clip_cov.eps_low,
        eps_high=config.clip_cov.eps_high,
        logratio_clamp=config.logratio_clamp,
    )
