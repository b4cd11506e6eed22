"""CISPO of MiniMax-M1, arXiv 2506.13585: the clip bounds a token's weight and never stops its gradient."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES, LossTokens, fused
from megatron_rlvr.metrics import Metric


@LOSSES.register("cispo")
def cispo(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi."""
    return fused(
        tokens,
        "cispo",
        eps_low=config.cispo.eps_low,
        eps_high=config.cispo.eps_high,
        logratio_clamp=config.logratio_clamp,
    )
