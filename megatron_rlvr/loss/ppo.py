"""PPO's clipped surrogate (arXiv 1707.06347) with DAPO's clip-higher (2503.14476) and dual clip (1912.09729)."""

import torch

from megatron_rlvr.config.schema import LossConfig
from megatron_rlvr.loss.policy import LOSSES, LossTokens, fused
from megatron_rlvr.metrics import Metric


@LOSSES.register("ppo")
def ppo(tokens: LossTokens, config: LossConfig) -> tuple[torch.Tensor, dict[str, Metric]]:
    """max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)), at most -A dual_clip where A < 0."""
    return fused(
        tokens,
        "ppo",
        eps_low=config.eps_low,
        eps_high=config.eps_high,
        dual_clip=config.dual_clip,
        logratio_clamp=config.logratio_clamp,
    )
